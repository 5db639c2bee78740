"""A profile measured on one device, made into one of another: every measured time changes by its own modelled ratio.

A time that was measured is multiplied by what the law gives for the target over what it gives for the source, of the
same forward. So of a profile's own device all is as it was measured, and errors that the law makes on both cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from math import hypot, isclose, log
from typing import TYPE_CHECKING

from batchsim.errors import InputError
from batchsim.hardware.catalogue import Device, device_of
from batchsim.hardware.device import Hardware
from batchsim.hardware.forwards import Forwards, forwards_of
from batchsim.hardware.kernels import Kernel
from batchsim.hardware.law import Rules, rules
from batchsim.profile import DecodeCurve, DeviceFit, LoopFit, PhaseFit, PrefillFit, Profile, Transfer

if TYPE_CHECKING:
    from batchsim.dynamic_scenario import DynamicScenario
    from batchsim.scenario import Scenario

# Decoding rows beside prompts, and their contexts, for which the parts of a forward that they add are compared.
MIXED_ROWS, MIXED_CONTEXT = 64, 300
ALIKE = ("clock_mhz", "memory_gb_per_s", "l2_bytes", "pcie_gb_per_s")
SUMMING = 2  # launches that a sum over devices costs the host as much as (24 us against 13)
CHOOSING = 6  # kernels more to find the best token of a divided vocabulary
HOST_TERMS = ("step_ns", "seq_ns", "prefill_token_ns", "admitted_ns", "token_ns")


def for_scenario(profile: Profile, scenario: Scenario | DynamicScenario) -> Profile:
    """The profile on the hardware that a scenario asks for; the profile itself where it asks for none.

    Raises:
        InputError: without a file; the profile is of a device that the catalogue does not know.
    """
    devices = scenario.tensor_parallel if scenario.kind == "serving" else 1
    if scenario.hardware is None and devices == 1:
        return profile
    return _kept(_Asked(profile, scenario.hardware, devices))


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """A profile, told from others by its identity, and hardware, by its values."""

    profile: Profile
    hardware: Hardware | None
    devices: int

    def __hash__(self) -> int:
        return hash((id(self.profile), self.devices))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Asked) or self.profile is not other.profile:
            return False
        return (self.hardware, self.devices) == (other.hardware, other.devices)


# A sweep asks for the same few again and again.
@lru_cache(maxsize=64)
def _kept(asked: _Asked) -> Profile:
    source = source_of(asked.profile)
    target = source if asked.hardware is None else asked.hardware.device()
    return transferred(asked.profile, target, asked.devices)


def source_of(profile: Profile) -> Device:
    """The device that a profile was measured on.

    Raises:
        InputError: without a file; the catalogue does not know it, or it is none.
    """
    found = device_of(profile.provenance)
    if found is None or not profile.overlaps:
        told = f"{profile.name}, measured on {shown_device(profile)}"
        raise InputError(None, "hardware", told, "a profile of a device in the catalogue (`batchsim hardware`)")
    return found


def shown_device(profile: Profile) -> str:
    return str(profile.provenance.get("device", "an unknown device"))


def transferred(profile: Profile, hardware: Device, tensor_parallel: int = 1, *, by: Rules | None = None) -> Profile:
    """What `profile` would be if it had been measured on `hardware`, each replica on `tensor_parallel` such devices.

    Raises:
        InputError: without a file; the profile is of a device that the catalogue does not know.
    """
    source = source_of(profile)
    pair = Pair(source, hardware, _rules(by or rules(), source, hardware), tensor_parallel, forwards_of(profile.model))
    slower = host_factor(hardware)
    if pair.alike and slower == 1.0 and hardware.memory_bytes == source.memory_bytes:
        return profile
    update: dict[str, object] = {
        "loops": {name: _loop(loop, pair, slower) for name, loop in profile.loops.items()},
        "device_memory_bytes": hardware.memory_bytes,
        "transfer": Transfer(
            source=source.title, target=hardware.title, hardware=hardware.name, tensor_parallel=tensor_parallel,
            spread=spread(pair, slower),
        ),
    }  # fmt: skip
    if not pair.alike:
        update["device"] = _device(profile.device, pair)
    if tensor_parallel > 1:
        more = {"per_layer": profile.kernels.per_layer + 2 * SUMMING, "last": profile.kernels.last + CHOOSING + SUMMING}
        update["kernels"] = profile.kernels.model_copy(update=more)
    return profile.model_copy(update=update)


def _rules(by: Rules, *devices: Device) -> Rules:
    """The rules by which to compare devices: where one's products were not recorded, all are estimated, so that what is
    wrong with estimates cancels."""
    known = all((device.family, device.planned) in by.plans for device in devices)
    return by if known else Rules(by.law, {})


@dataclass(frozen=True, slots=True)
class Pair:
    """A source and a target, and the model that runs on both, on the target divided among `devices`."""

    source: Device
    target: Device
    rules: Rules
    devices: int
    forwards: Forwards

    @property
    def alike(self) -> bool:
        """Whether forwards and copies take as long on both."""
        return self.source.sms == self.target.sms and self._same_multiprocessors

    @property
    def part(self) -> bool:
        """Whether the target is a part of the source, on which the same kernels run."""
        return self.source.planned == self.target.planned and self._same_multiprocessors

    @property
    def _same_multiprocessors(self) -> bool:
        """Whether the two differ in how many multiprocessors they have at most."""
        same = all(getattr(self.source, key) == getattr(self.target, key) for key in ALIKE)
        return same and self.devices == 1 and isclose(self.chain, 1.0)

    @property
    def clock(self) -> float:
        """By what latencies inside the device change."""
        return self.source.clock_mhz / self.target.clock_mhz

    @property
    def link(self) -> float:
        """By what large copies to and from the host change."""
        return self.source.pcie_gb_per_s / self.target.pcie_gb_per_s

    @property
    def chain(self) -> float:
        """By what changes what one multiprocessor has to do alone."""
        return self.arithmetic * self.devices / self.source.sms * self.target.sms

    @property
    def arithmetic(self) -> float:
        """By what kernels change that only compute, divided among the devices."""
        dtype = self.forwards.dtype
        return self.source.matrix_rate(dtype) / self.target.matrix_rate(dtype) / self.devices

    def ratio(self, kernels: Callable[[int], Iterable[Kernel]]) -> float:
        """By what a forward changes; `kernels` gives those of one of so many devices."""
        found = self.target_ns(kernels(self.devices)) / self.source_ns(kernels(1))
        return max(found, 1.0) if self.part and self.target.sms < self.source.sms else found

    def share(self, kernels: Callable[[int], Iterable[Kernel]], name: str) -> tuple[float, float]:
        """The share that the kernel `name` has in a forward, on the source and on the target."""
        before, after = tuple(kernels(1)), tuple(kernels(self.devices))
        old = self.source_ns(each for each in before if each.name == name) / self.source_ns(before)
        return old, self.target_ns(each for each in after if each.name == name) / self.target_ns(after)

    def source_ns(self, kernels: Iterable[Kernel]) -> float:
        return self.rules.forward_ns(kernels, self.source, self.forwards.dtype, measured=self.part)

    def target_ns(self, kernels: Iterable[Kernel]) -> float:
        return self.rules.forward_ns(kernels, self.target, self.forwards.dtype, self.devices, measured=self.part)


def _device(fit: DeviceFit, pair: Pair) -> DeviceFit:
    forwards, largest = pair.forwards, fit.decode[-1]
    share = fit.outer_share
    if share:
        before, after = pair.share(lambda devices: forwards.decode(largest.size, largest.kv_tokens[0], devices), "head")
        share = min(share * after / before, 0.9) if before else share
    return fit.model_copy(
        update={
            "decode": [_curve(curve, pair) for curve in fit.decode],
            "prefill": prefill_on(fit.prefill, pair),
            "outer_share": share,
        }
    )


def _curve(curve: DecodeCurve, pair: Pair) -> DecodeCurve:
    ns = [
        ns * pair.ratio(partial(pair.forwards.decode, curve.size, kv_tokens))
        for kv_tokens, ns in zip(curve.kv_tokens, curve.ns, strict=True)
    ]
    return curve.model_copy(update={"ns": ns})


def prefill_on(fit: PrefillFit, pair: Pair) -> PrefillFit:
    """Each term by its own ratio: matrix products, attention's arithmetic, its longest chain, and contexts read."""
    if not any(fit.ns):  # a service has no prompts
        return fit
    forwards = pair.forwards
    base = [ns * pair.ratio(partial(forwards.prompts, count)) for count, ns in zip(fit.num_tokens, fit.ns, strict=True)]
    reading = pair.ratio(partial(forwards.attention, MIXED_ROWS, MIXED_ROWS * MIXED_CONTEXT))
    latency = pair.ratio(partial(forwards.attention, MIXED_ROWS, MIXED_ROWS))
    per_token = pair.ratio(partial(forwards.attention, MIXED_ROWS, 1e9))
    return fit.model_copy(
        update={
            "ns": base, "pair_ns": fit.pair_ns * pair.arithmetic, "depth_ns": fit.depth_ns * pair.chain,
            "mixed_ns": fit.mixed_ns * latency, "row_ns": fit.row_ns * reading, "kv_ns": fit.kv_ns * per_token,
        }
    )  # fmt: skip


def _loop(loop: LoopFit, pair: Pair, slower: float) -> LoopFit:
    """Host phases by the host; copies that grow by the link; pauses between the device's operations by its clock."""
    update: dict[str, object] = {
        "phases": {name: _phase(phase, slower) for name, phase in loop.phases.items()},
        "kernel_launch": _phase(loop.kernel_launch, slower),
        **{key: round(getattr(loop, key) * slower) for key in ("launch_ns", "copy_ns", "wake_up_ns")},
        **{key: round(getattr(loop, key) * pair.clock) for key in ("event_ns", "gap_ns")},
        **{
            key: getattr(loop, key) * pair.link
            for key in ("copy_in_device_seq_ns", "copy_in_device_token_ns", "copy_out_device_seq_ns")
        },
    }
    return loop.model_copy(update=update)


def _phase(phase: PhaseFit, slower: float) -> PhaseFit:
    return phase.model_copy(update={term: getattr(phase, term) * slower for term in HOST_TERMS})


def host_factor(hardware: Device) -> float:
    """By what host work takes longer than on the profile's host: a slower thread, less than a core for each loop."""
    return max(1.0, 1.0 / hardware.host_cores) / hardware.host_speed


def spread(pair: Pair, slower: float) -> dict[str, float]:
    """Relative standard deviation of what the transfer multiplies each part with.

    Where nothing changes there is none; else it grows with the distance: by each halving or doubling of what changes
    most, up to two.
    """
    source, target = pair.source, pair.target
    # Parts of one device alone were measured: an H100 is an H200 with another memory, of which nothing is known.
    alike = isclose(pair.chain, 1.0) and all(
        getattr(target, key) == getattr(source, key) for key in ("family", "planned", "clock_mhz", "memory_gb_per_s")
    )
    known = pair.rules.law.spread["part" if alike else "other"]
    rates = (
        target.sms / source.sms,
        target.memory_gb_per_s / source.memory_gb_per_s,
        target.matrix_rate(pair.forwards.dtype) / source.matrix_rate(pair.forwards.dtype),
        target.clock_mhz / source.clock_mhz,
    )
    device = max(map(_halvings, rates))
    distances = {"decode": device, "prefill": device, "host": _halvings(slower), "copies": _halvings(pair.link)}
    if pair.devices > 1:
        known = {part: _joined(own, pair.rules.law.spread["shared"].get(part)) for part, own in known.items()}
        distances |= {part: max(distances[part], _halvings(pair.devices)) for part in ("decode", "prefill")}
    # Of another family the kernels are others, even if all of its rates are the same.
    changed = {part for part, distance in distances.items() if distance}
    changed |= set() if alike or pair.alike else {"decode", "prefill"}
    return {
        part: hypot(known[part][0], known[part][1] * distance) if part in changed else 0.0
        for part, distance in distances.items()
    }


def _halvings(ratio: float) -> float:
    return min(abs(log(ratio)) / log(2), 2.0)


def _joined(own: tuple[float, float], more: tuple[float, float] | None) -> tuple[float, float]:
    return own if more is None else (hypot(own[0], more[0]), hypot(own[1], more[1]))
