"""What training costs on the simulated machine: a profile's fits, as bursts of kernels layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from batchsim.batching.accumulation import MicroBatch
from batchsim.costs import Draws
from batchsim.streams import Burst, Latencies
from batchsim.training_profile import HostFit, PrecisionFit, TrainingProfile


class TrainingCosts:
    """The costs of one scenario; see `batchsim.training_machine.Costs`.

    `host_speed` is the speed of one host thread relative to the profile's machine. With `jitter` every micro-batch
    draws its host costs from the measured distribution; without, it pays their means. `prepare_ms_per_sequence` takes
    the place of what collating a sequence was measured to cost; it is prescribed, and not drawn.
    """

    def __init__(
        self,
        profile: TrainingProfile,
        fit: PrecisionFit,
        *,
        checkpointing: str,
        optimizer: str,
        prepare_ms_per_sequence: float | None = None,
        host_speed: float = 1.0,
        jitter: bool = True,
        seed: int = 0,
        replication: int = 0,
    ) -> None:
        self._profile, self._fit = profile, fit
        self._host, self._optimizer = fit.host[checkpointing], fit.optimizers[optimizer]
        self._recompute = fit.recompute if checkpointing == "full" else 0.0
        self._prepare_ms_per_sequence = prepare_ms_per_sequence
        self._scale, self._jitter = 1 / host_speed, jitter
        self._seed, self._replication = seed, replication
        self._draws: dict[str, Draws] = {}
        self._asked: set[tuple[int, int]] = set()
        overlaps = profile.overlaps
        self.latencies = Latencies(wake_up_ns=round(profile.round_trip_ns * self._scale) if overlaps else 0)

    def host_ns(self, phase: str, micro: MicroBatch | None) -> int:
        """Host time of a phase that launches nothing on the compute stream."""
        if phase == "prepare" and micro is not None:
            return self._prepare_ns(micro)
        call = self._profile.calls.get(phase)
        return 0 if call is None else self._drawn(phase, call, first=True)

    def copy_ns(self, micro: MicroBatch) -> int:
        """Device time of copying the tokens."""
        return round(self._profile.copy_in_device.at(micro.sequences, micro.sequence_length))

    def forward(self, micro: MicroBatch) -> Sequence[Burst]:
        """The launches of a forward pass: layer by layer, and the head with the loss."""
        return (*self._part("layers", micro), *self._part("head", micro))

    def backward(self, micro: MicroBatch) -> Sequence[Burst]:
        """The launches of a backward pass."""
        return (*self._part("head_backward", micro), *self._part("layers_backward", micro))

    def optimizer(self) -> tuple[int, Sequence[Burst], int]:
        """(host time before it launches anything, its launches, host time after them to free the gradients)."""
        fit = self._optimizer
        host_ns, device_ns = self._drawn("optimizer", fit.host, first=True), round(fit.device_ns)
        after_ns = self._drawn("zero_grad", fit.zero_grad, first=True)
        if not self._profile.overlaps:
            return 0, (burst(device_ns, device_ns, 1),), after_ns
        return host_ns, (burst(0, device_ns, fit.launches),), after_ns

    def extrapolated(self) -> list[str]:
        """What was asked for outside the measured range, a sentence each; empty where nothing was."""
        curve, told = self._fit.device["layers"], []
        for tokens, length in sorted(self._asked):
            if not curve.tokens[0] <= tokens <= curve.tokens[-1]:
                measured = f"{curve.tokens[0]:,} to {curve.tokens[-1]:,}"
                told.append(f"micro-batches of {tokens:,} tokens (measured: {measured}): extrapolated")
            lengths = curve.sequence_length
            if lengths and not lengths[0] <= length <= lengths[-1]:
                told.append(f"sequences of {length:,} (measured: {lengths[0]:,} to {lengths[-1]:,}): extrapolated")
        return told

    def _part(self, part: str, micro: MicroBatch) -> Sequence[Burst]:
        self._asked.add((micro.tokens, micro.sequence_length))
        device_ns = self._device_ns(part, micro)
        launches = self._host[part]
        if not self._profile.overlaps:  # launching is computing
            return (burst(device_ns, device_ns, 1),)
        count = launches.first if micro.first else launches.later
        host_ns = self._drawn(part, launches.host, first=micro.first)
        bursts = []
        if part == "layers" and (leading := round(count * self._fit.lead)):
            lead_ns = round(host_ns * self._fit.lead)
            bursts.append(burst(lead_ns, 0, leading))
            host_ns, count = host_ns - lead_ns, count - leading
        pieces = max(min(self._profile.layers, count), 1) if part.startswith("layers") else 1
        each = zip(shares(host_ns, pieces), shares(device_ns, pieces), shares(count, pieces), strict=True)
        return bursts + [burst(host, device, kernels) for host, device, kernels in each]

    def _device_ns(self, part: str, micro: MicroBatch) -> int:
        tokens, length = micro.tokens, micro.sequence_length
        ns = self._fit.device[part].at(tokens, length)
        if part == "layers_backward" and self._recompute:
            ns += self._recompute * self._fit.device["layers"].at(tokens, length)
        return round(ns if micro.first else ns + self._fit.accumulate_ns.get(part, 0.0))

    def _prepare_ns(self, micro: MicroBatch) -> int:
        fit = self._profile.prepare
        prescribed, ratio = self._prepare_ms_per_sequence, self._ratio("prepare", fit.ratios)
        if prescribed is None:
            ns = fit.at(micro.sequences, micro.sequence_length) * ratio
        else:
            ns = prescribed * 1e6 * micro.sequences + fit.call_ns * ratio
        return round(ns * self._scale)

    def _drawn(self, name: str, fit: HostFit, *, first: bool) -> int:
        return round(fit.at(first=first) * self._ratio(name, fit.ratios) * self._scale)

    def _ratio(self, name: str, ratios: Sequence[float]) -> float:
        if not self._jitter:
            return sum(ratios) / len(ratios)
        if name not in self._draws:
            self._draws[name] = Draws(ratios, seed=self._seed, replication=self._replication, name=name)
        return self._draws[name].next()


def shares(total: int, count: int) -> list[int]:
    """`count` integers, as equal as can be, that sum to `total`."""
    return [total * (i + 1) // count - total * i // count for i in range(count)]


@lru_cache(maxsize=4096)
def burst(host_ns: int, device_ns: int, kernels: int) -> Burst:
    """So many kernels of equal times that take the host and the device so long in all."""
    return Burst(tuple(shares(host_ns, kernels)), tuple(shares(device_ns, kernels)))
