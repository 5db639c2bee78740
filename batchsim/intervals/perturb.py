"""A profile whose costs are all a little off, as the one that a run will meet may be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import cos, exp, pi, sqrt
from typing import TypeVar

from batchsim.profile import DecodeCurve, DeviceFit, LoopFit, PhaseFit, Profile
from batchsim.training_profile import (
    Curve,
    HostFit,
    Launches,
    OptimizerFit,
    PrecisionFit,
    TokenFit,
    TrainingProfile,
)

AnyModel = TypeVar("AnyModel", PhaseFit, HostFit, TokenFit)

# What may be off, each by a factor of its own. `host`: all of the host's work. `sync`, `async`: that of one loop.
# `decode`: the device's time of every decode, or of every forward of a service. `shape`: that of small and large
# batches, of short and long contexts against one another. `prefill`: forwards with prompts. `copies`: copies and the
# latencies of launching and waking up. `beside`: what decoding rows add to a forward with prompts.
SERVING = ("host", "sync", "async", "decode", "shape", "prefill", "copies", "beside")
# `calls`: single calls and the data's preparation. `backward`: launching the backward pass. `device`, `shape`: forward
# and backward passes on the device, and those of small against large micro-batches. `optimizer`: its step there.
TRAINING = ("host", "calls", "backward", "device", "shape", "optimizer", "copies")

_PHASE = ("step_ns", "seq_ns", "prefill_token_ns", "admitted_ns", "token_ns")
_TOKENS = ("call_ns", "sequence_ns", "token_ns")


def perturbed(
    profile: Profile | TrainingProfile, factors: Mapping[str, float], loops: Iterable[str] | None = None
) -> Profile | TrainingProfile:
    """`profile` with the times of each part multiplied by exp of its value in `factors`; keys as SERVING or TRAINING.

    `loops`: leave out all other loops of a serving profile, which a run has no use for.
    """
    if isinstance(profile, Profile):
        return _serving(profile, factors, profile.loops if loops is None else loops)
    return _training(profile, factors)


def _serving(profile: Profile, factors: Mapping[str, float], loops: Iterable[str]) -> Profile:
    copies = exp(factors.get("copies", 0.0))
    host = {name: factors.get("host", 0.0) + factors.get(name.split("/")[0], 0.0) for name in loops}
    changed = {
        name: _loop(profile.loops[name], exp(off), copies) for name, off in host.items() if name in profile.loops
    }
    return profile.model_copy(update={"loops": changed, "device": _device(profile.device, factors)})


def _loop(loop: LoopFit, host: float, copies: float) -> LoopFit:
    return loop.model_copy(
        update={
            "phases": {name: _scaled(fit, _PHASE, host) for name, fit in loop.phases.items()},
            "kernel_launch": _scaled(loop.kernel_launch, _PHASE, host),
            **{
                name: round(getattr(loop, name) * copies)
                for name in (
                    "launch_ns", "copy_ns", "event_ns", "gap_ns", "wake_up_ns", "copy_in_device_ns",
                    "copy_out_device_ns",
                )
            },
            **{
                name: getattr(loop, name) * copies
                for name in ("copy_in_device_seq_ns", "copy_in_device_token_ns", "copy_out_device_seq_ns")
            },
        }
    )  # fmt: skip


def _device(device: DeviceFit, factors: Mapping[str, float]) -> DeviceFit:
    decode, shape = factors.get("decode", 0.0), factors.get("shape", 0.0)
    prefill, beside = exp(factors.get("prefill", 0.0)), exp(factors.get("beside", 0.0))
    fit = device.prefill
    count = len(device.decode)
    curves = [_curve(curve, decode, shape, i / max(count - 1, 1)) for i, curve in enumerate(device.decode)]
    changed = fit.model_copy(
        update={
            "ns": [ns * prefill for ns in fit.ns],
            "pair_ns": fit.pair_ns * prefill,
            "depth_ns": fit.depth_ns * prefill,
            **{name: getattr(fit, name) * prefill * beside for name in ("mixed_ns", "row_ns", "kv_ns")},
        }
    )
    return device.model_copy(update={"decode": curves, "prefill": changed})


def _curve(curve: DecodeCurve, decode: float, shape: float, at: float) -> DecodeCurve:
    last = max(len(curve.ns) - 1, 1)
    return curve.model_copy(
        update={"ns": [ns * exp(decode + shape * wave(at + j / last)) for j, ns in enumerate(curve.ns)]}
    )


def wave(at: float) -> float:
    """A smooth error over a grid, from 0 to 1 along one of its sides, to 2 along two: mean square 1, mean 0."""
    return sqrt(2) * cos(pi * at)


def _training(profile: TrainingProfile, factors: Mapping[str, float]) -> TrainingProfile:
    host = factors.get("host", 0.0)
    calls, copies = exp(host + factors.get("calls", 0.0)), exp(factors.get("copies", 0.0))
    return profile.model_copy(
        update={
            "prepare": _scaled(profile.prepare, _TOKENS, calls),
            "copy_in_device": _scaled(profile.copy_in_device, _TOKENS, copies),
            "calls": {phase: _call(fit, calls) for phase, fit in profile.calls.items()},
            "round_trip_ns": profile.round_trip_ns * copies,
            "precisions": {name: _precision(fit, factors) for name, fit in profile.precisions.items()},
        }
    )


def _precision(fit: PrecisionFit, factors: Mapping[str, float]) -> PrecisionFit:
    host, device = factors.get("host", 0.0), exp(factors.get("device", 0.0))
    backward, optimizer = exp(host + factors.get("backward", 0.0)), exp(factors.get("optimizer", 0.0))

    def launches(part: Launches, name: str) -> Launches:
        return part.model_copy(update={"host": _call(part.host, backward if "backward" in name else exp(host))})

    def stepped(each: OptimizerFit) -> OptimizerFit:
        update = {"host": _call(each.host, exp(host)), "zero_grad": _call(each.zero_grad, exp(host))}
        return each.model_copy(update={**update, "device_ns": each.device_ns * optimizer})

    def curve(each: Curve) -> Curve:
        last = max(len(each.ns) - 1, 1)
        shape = [exp(factors.get("shape", 0.0) * wave(i / last)) for i in range(len(each.ns))]
        ns = [value * by * device for value, by in zip(each.ns, shape, strict=True)]
        return each.model_copy(update={"ns": ns, "token_ns": [value * device for value in each.token_ns]})

    return fit.model_copy(
        update={
            "host": {
                kind: {name: launches(part, name) for name, part in parts.items()} for kind, parts in fit.host.items()
            },
            "device": {name: curve(each) for name, each in fit.device.items()},
            "accumulate_ns": {name: ns * device for name, ns in fit.accumulate_ns.items()},
            "optimizers": {name: stepped(each) for name, each in fit.optimizers.items()},
        }
    )


def _call(fit: HostFit, by: float) -> HostFit:
    return _scaled(fit, ("ns", "later_ns"), by)


def _scaled(fit: AnyModel, costs: Sequence[str], by: float) -> AnyModel:
    return fit.model_copy(update={name: getattr(fit, name) * by for name in costs})
