"""The costs of a profile's loops, drawn step by step, for the simulated machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from zlib import crc32

import numpy as np
import numpy.typing as npt

from batchsim.batching.batch import AnyBatch
from batchsim.machine import Burst, Latencies
from batchsim.operations import KernelSync
from batchsim.profile import DecodeCurve, PhaseFit, Profile
from batchsim.schedules import loop_name
from batchsim.tiles.level import NOTHING_SAVED, Saved, TileLevel


class Draws:
    """Endless draws from equal-count bins, from a stream of its own.

    The stream is `SeedSequence(seed, spawn_key=(replication, crc32(name)))`: a new component shifts no other's
    draws, and all schedules of a comparison see the same ones.
    """

    def __init__(self, values: Sequence[float], *, seed: int, replication: int, name: str) -> None:
        sequence = np.random.SeedSequence(seed, spawn_key=(replication, crc32(name.encode())))
        self._rng = np.random.Generator(np.random.PCG64(sequence))
        self._values = np.asarray(values, dtype=np.float64)
        self._drawn: Iterator[float] = iter(())

    def take(self, count: int) -> npt.NDArray[np.float64]:
        """The next `count` draws: the same ones however many are taken at a time."""
        if len(self._values) == 1:
            return np.repeat(self._values, count)
        return self._values[self._rng.integers(0, len(self._values), count)]

    def next(self) -> float:
        for value in self._drawn:
            return value
        self._drawn = iter(self.take(4096).tolist())
        return next(self._drawn)


class ProfileCosts:
    """The costs of one loop of a profile, for the simulated machine.

    `host_speed` is the speed of one host thread relative to the profile's machine. With `jitter` every step
    draws its costs from the measured distribution; without, it pays their means. `tiles` tells what tile
    synchronisation saves.
    """

    def __init__(
        self,
        profile: Profile,
        schedule: str,
        *,
        graphs: bool,
        host_speed: float = 1.0,
        jitter: bool = True,
        seed: int = 0,
        replication: int = 0,
        replica: int = 0,
        tiles: TileLevel | None = None,
    ) -> None:
        self._tiles = tiles
        self.loop = profile.loops[loop_name(schedule, graphs=graphs)]
        self.device = profile.device
        self.graphs = graphs
        self.overlaps = profile.overlaps
        self._extrapolated: dict[str, tuple[int, int]] = {}
        self.scale = 1 / host_speed
        self._jitter = jitter
        self._seed, self._replication, self._replica = seed, replication, replica
        self._draws: dict[str, Draws] = {}
        self.kernels = profile.kernels
        loop = self.loop
        self.latencies = Latencies(
            launch_ns=round(loop.launch_ns * self.scale) if profile.overlaps else 0,
            copy_ns=round(loop.copy_ns * self.scale),
            event_ns=loop.event_ns,
            gap_ns=loop.gap_ns,
            wake_up_ns=round(loop.wake_up_ns * self.scale),
        )

    def host_ns(self, phase: str, batch: AnyBatch | None) -> int:
        """See `batchsim.machine.Costs`."""
        return self._host_time(phase, batch)

    def copy_ns(self, phase: str, batch: AnyBatch) -> int:
        """See `batchsim.machine.Costs`."""
        loop, seqs = self.loop, batch.num_seqs
        if phase == "copy_in":
            more_ns = loop.copy_in_device_seq_ns * seqs + loop.copy_in_device_token_ns * batch.num_tokens
            return round(loop.copy_in_device_ns + more_ns)
        return round(loop.copy_out_device_ns + loop.copy_out_device_seq_ns * seqs)

    def launch(self, batch: AnyBatch, kernels: KernelSync = "stream") -> Sequence[Burst]:
        """See `batchsim.machine.Costs`: one burst for a graph, else one a layer and one before and after them."""
        if not self.overlaps:
            forward_ns = self.prefill_ns(batch) if batch.prefill_tokens else self.decode_ns(batch)
            return (Burst((forward_ns,), (forward_ns,)),)
        saved = self._saved(batch) if kernels == "tile" else NOTHING_SAVED
        if self.graphs and not batch.prefill_tokens:
            host_ns = self._host_time("launch", batch)
            return (Burst((host_ns,), (self.decode_ns(batch) - saved.ns,)),)
        launch_ns = self._host_time("kernel_launch", None)
        if batch.prefill_tokens:
            # The LM head, over the sampled rows alone, is next to nothing beside the prompts' tokens.
            rows = batch.num_tokens - batch.prefill_tokens
            return self.kernels.bursts(rows, launch_ns, self.prefill_ns(batch) - saved.ns, 0.0, saved.launches)
        device_ns = self.decode_ns(batch) * self.device.eager_factor - saved.ns
        rows = self._curve(batch.num_seqs).size
        return self.kernels.bursts(rows, launch_ns, device_ns, self.device.outer_share, saved.launches)

    def _saved(self, batch: AnyBatch) -> Saved:
        """What tile synchronisation takes off the forward."""
        if self._tiles is None:
            return NOTHING_SAVED
        return self._tiles.saved(batch.num_tokens if batch.prefill_tokens else self._curve(batch.num_seqs).size)

    def decode_ns(self, batch: AnyBatch) -> int:
        """Device time of a forward without prompts, or of a service's, nanoseconds."""
        curve = self._curve(batch.num_seqs)
        kv_tokens = batch.kv_tokens
        if batch.stage == "forward":
            # Padded rows are as long as the others: a service's curves are by the tokens of all rows.
            kv_tokens = kv_tokens // batch.num_seqs * max(curve.size, batch.num_seqs)
        low, high = curve.kv_tokens[0], curve.kv_tokens[-1]
        if not low * 0.5 <= kv_tokens <= high * 1.02:
            self.note_context(curve, kv_tokens)
        ns = curve.at(kv_tokens) + self.device.beyond_ns(batch.num_seqs)
        return round(ns * self._ratio("decode"))

    def prefill_ns(self, batch: AnyBatch) -> int:
        """Device time of a forward with prompt tokens, nanoseconds."""
        fit = self.device.prefill
        if batch.num_tokens > fit.num_tokens[-1]:
            self.note_prefill(batch.num_tokens)
        decodes = batch.num_tokens - batch.prefill_tokens
        ns = fit.at(batch.num_tokens, batch.prefill_pairs(fit.tile), batch.prefill_depth, decodes, batch.kv_tokens)
        return round(ns * self._ratio("prefill"))

    def _curve(self, num_seqs: int) -> DecodeCurve:
        for curve in self.device.decode:
            if curve.size >= num_seqs:
                return curve
        self.note_rows(num_seqs)
        return self.device.decode[-1]

    def extrapolated(self) -> list[str]:
        """What was asked for outside the measured range, a sentence each; empty where nothing was."""
        return [f"{what}: extrapolated to {low}..{high}" for what, (low, high) in sorted(self._extrapolated.items())]

    def note_context(self, curve: DecodeCurve, kv_tokens: int) -> None:
        """So many tokens of context were asked of `curve`, more or far fewer than measured."""
        self._note(
            f"decode of {curve.size} rows (measured up to {curve.kv_tokens[-1]} tokens of context in all)", kv_tokens
        )

    def note_prefill(self, num_tokens: int) -> None:
        """So many tokens with prompts among them were asked for, more than measured."""
        self._note(f"prefill (measured up to {self.device.prefill.num_tokens[-1]} tokens)", num_tokens)

    def note_rows(self, num_seqs: int) -> None:
        """So many rows were asked for, more than measured."""
        self._note(f"decode (measured up to {self.device.decode[-1].size} rows)", num_seqs)

    def _note(self, what: str, value: int) -> None:
        low, high = self._extrapolated.get(what, (value, value))
        self._extrapolated[what] = min(low, value), max(high, value)

    def draws(self, name: str) -> Draws:
        """The ratios of measured to fitted time of a host phase, of `kernel_launch`, `decode` or `prefill`."""
        match name:
            case "decode":
                ratios = self.device.decode_ratios
            case "prefill":
                ratios = self.device.prefill_ratios
            case _:
                ratios = self.host_fit(name).ratios
        values = ratios if self._jitter else [sum(ratios) / len(ratios)]
        stream = f"{name}/{self._replica}" if self._replica else name
        return Draws(values, seed=self._seed, replication=self._replication, name=stream)

    def host_fit(self, name: str) -> PhaseFit:
        """What a host phase or `kernel_launch` costs; without graphs that is what `launch` is made of."""
        if name == "kernel_launch" or name not in self.loop.phases:
            return self.loop.kernel_launch
        return self.loop.phases[name]

    def _ratio(self, name: str) -> float:
        if name not in self._draws:
            self._draws[name] = self.draws(name)
        return self._draws[name].next()

    def _host_time(self, name: str, batch: AnyBatch | None) -> int:
        fit = self.host_fit(name)
        # None: a scheduling call that found nothing to run.
        ns = fit.step_ns
        if batch is not None:
            ns = fit.linear_ns(batch.num_seqs, batch.prefill_tokens, batch.admitted, batch.num_tokens)
        return round(ns * self._ratio(name) * self.scale)
