"""The stages of a step that could get faster, and the scenario and costs in which one of them is.

A stage that is faster by a share does its work at (1 + share) times its speed: each of its times is divided by that. A
stage here is one that results tell the time of (`stage_ms`), or a latency between stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from batchsim.profile import DeviceFit, LoopFit, PhaseFit, PrefillFit, Profile
from batchsim.service_times import Samples, ServiceTime
from batchsim.training_profile import HostFit, Launches, OptimizerFit, PrecisionFit, TokenFit, TrainingProfile

if TYPE_CHECKING:
    from batchsim.dynamic_scenario import DynamicScenario
    from batchsim.kinds import AnyProfile, AnyScenario

AnyFit = TypeVar("AnyFit", PhaseFit, HostFit, TokenFit, LoopFit, PrefillFit)
Faster = Callable[[Any, Any, float], tuple[Any, Any]]

_PHASE = ("step_ns", "seq_ns", "prefill_token_ns", "admitted_ns", "token_ns", "outlier_ns")
_HOST = ("ns", "later_ns", "outlier_ns")
_TOKENS = ("call_ns", "sequence_ns", "token_ns")
_FORWARD, _BACKWARD = ("layers", "head"), ("head_backward", "layers_backward")

# What host phases do, and latencies are.
_HOST_TEXTS = {
    "schedule": "choosing the next batch", "build_inputs": "writing its inputs", "copy_in": "asking for the copy in",
    "launch": "launching the forward", "copy_out": "asking for the copy out", "record": "recording events",
    "stream_wait": "making streams wait", "wait": "asking whether the results are there",
    "update": "reading results and updating the requests",
}  # fmt: skip
_DEVICE_TEXTS = {
    "decode": "forwards that only generate", "prefill": "forwards with prompts", "forward": "forwards",
    "device_copy_in": "copying inputs to the device", "device_copy_out": "copying results to the host",
}  # fmt: skip
_LATENCIES = {
    "launch_latency": (("launch_ns", "copy_ns"), "from a launch to the start on an idle device"),
    "stream_latency": (("event_ns", "gap_ns"), "from the end of a command on the device to the start of the next"),
    "wake_up": (("wake_up_ns",), "from the end of a command to the host's waking up"),
}


@dataclass(frozen=True)
class Stage:
    """One part of a step: `side` is who does it, `text` what it is.

    `faster(scenario, costs, speed)` gives both with the stage at so many times its speed.
    """

    name: str
    side: Literal["host", "device", "latency", "server"]
    text: str
    faster: Faster


def stages_of(scenario: AnyScenario, costs: AnyProfile) -> list[Stage]:
    """The stages of a scenario at some costs, the host's first."""
    match costs:
        case Profile():
            return _of_loops(scenario, costs)
        case TrainingProfile():
            return _of_training(costs)
        case _:
            return [Stage("forward", "server", "serving a batch", _faster_table)]


def all_faster(stages: Iterable[Stage], scenario: AnyScenario, costs: AnyProfile, speed: float) -> tuple[Any, Any]:
    """The scenario and its costs with every stage faster."""
    return reduce(lambda both, stage: stage.faster(*both, speed), stages, (scenario, costs))


def _of_loops(scenario: AnyScenario, profile: Profile) -> list[Stage]:
    loops = list(profile.loops.values())
    found = [
        Stage(name, "host", text, _phase(name))
        for name, text in _HOST_TEXTS.items()
        if name == "launch" or any(loop.phases.get(name) is not None for loop in loops)
    ]
    names = ("forward",) if scenario.kind == "dynamic" else ("decode", "prefill")
    found += [Stage(name, "device", _DEVICE_TEXTS[name], _device(name)) for name in names]
    found += [Stage(name, "device", _DEVICE_TEXTS[name], _copy(name)) for name in ("device_copy_in", "device_copy_out")]
    if profile.overlaps:
        found += [Stage(name, "latency", text, _latency(keys)) for name, (keys, text) in _LATENCIES.items()]
    return found


def _of_loop(change: Callable[[LoopFit, float], LoopFit]) -> Faster:
    def faster(scenario: Any, profile: Profile, speed: float) -> tuple[Any, Profile]:
        loops = {name: change(loop, speed) for name, loop in profile.loops.items()}
        return scenario, profile.model_copy(update={"loops": loops})

    return faster


def _phase(name: str) -> Faster:
    def change(loop: LoopFit, speed: float) -> LoopFit:
        phases = {phase: _divided(fit, _PHASE, speed) if phase == name else fit for phase, fit in loop.phases.items()}
        update: dict[str, Any] = {"phases": phases}
        if name == "launch":  # kernel by kernel, where no graph is
            update["kernel_launch"] = _divided(loop.kernel_launch, _PHASE, speed)
        return loop.model_copy(update=update)

    return _of_loop(change)


def _copy(name: str) -> Faster:
    keys = [f"{name.removeprefix('device_')}_device_{what}" for what in ("ns", "seq_ns", "token_ns")]
    return _of_loop(lambda loop, speed: _divided(loop, [key for key in keys if hasattr(loop, key)], speed))


def _latency(keys: Iterable[str]) -> Faster:
    return _of_loop(lambda loop, speed: _divided(loop, keys, speed))


def _device(name: str) -> Faster:
    def faster(scenario: Any, profile: Profile, speed: float) -> tuple[Any, Profile]:
        device = profile.device
        if name == "prefill":
            prefill = device.prefill
            changed: DeviceFit = device.model_copy(
                update={
                    "prefill": _divided(
                        prefill.model_copy(update={"ns": [ns / speed for ns in prefill.ns]}),
                        ("pair_ns", "depth_ns", "mixed_ns", "row_ns", "kv_ns"),
                        speed,
                    )
                }
            )
        else:
            curves = [each.model_copy(update={"ns": [ns / speed for ns in each.ns]}) for each in device.decode]
            changed = device.model_copy(update={"decode": curves})
        return scenario, profile.model_copy(update={"device": changed})

    return faster


def _divided(fit: AnyFit, keys: Iterable[str], speed: float) -> AnyFit:
    """`fit` with the times of `keys` divided; whole nanoseconds stay whole."""
    update: dict[str, float] = {}
    for key in keys:
        value = getattr(fit, key)
        update[key] = round(value / speed) if isinstance(value, int) else value / speed
    return fit.model_copy(update=update)


def _of_training(profile: TrainingProfile) -> list[Stage]:
    calls = {
        "copy_in": "asking for the copy in", "record": "recording events", "stream_wait": "making streams wait",
        "wait": "asking whether the loss is there", "read_loss": "reading the loss",
    }  # fmt: skip
    known = [(name, calls.get(name, "a call")) for name in profile.calls]
    return [
        Stage("prepare", "host", "preparing the data", _prepare),
        *(Stage(name, "host", text, _call(name)) for name, text in known),
        Stage("launch_forward", "host", "launching the forward pass", _precision(_launches(_FORWARD))),
        Stage("launch_backward", "host", "launching the backward pass", _precision(_launches(_BACKWARD))),
        Stage("launch_optimizer", "host", "launching the optimiser's step", _precision(_optimizer_host)),
        Stage("forward", "device", "forward passes", _precision(_passes(_FORWARD))),
        Stage("backward", "device", "backward passes", _precision(_passes(_BACKWARD))),
        Stage("optimizer", "device", "the optimiser's step", _precision(_optimizer_device)),
        Stage("device_copy_in", "device", "copying the data to the device", _data_copy),
        Stage("wake_up", "latency", "from a launch on an idle device to the host's waking up", _round_trip),
    ]


def _prepare(scenario: Any, profile: TrainingProfile, speed: float) -> tuple[Any, TrainingProfile]:
    data = scenario.data
    if data.prepare_ms_per_sequence is not None:
        data = data.model_copy(update={"prepare_ms_per_sequence": data.prepare_ms_per_sequence / speed})
    prepare = _divided(profile.prepare, _TOKENS, speed)
    return scenario.model_copy(update={"data": data}), profile.model_copy(update={"prepare": prepare})


def _call(name: str) -> Faster:
    def faster(scenario: Any, profile: TrainingProfile, speed: float) -> tuple[Any, TrainingProfile]:
        calls = {**profile.calls, name: _divided(profile.calls[name], _HOST, speed)}
        return scenario, profile.model_copy(update={"calls": calls})

    return faster


def _data_copy(scenario: Any, profile: TrainingProfile, speed: float) -> tuple[Any, TrainingProfile]:
    return scenario, profile.model_copy(update={"copy_in_device": _divided(profile.copy_in_device, _TOKENS, speed)})


def _round_trip(scenario: Any, profile: TrainingProfile, speed: float) -> tuple[Any, TrainingProfile]:
    return scenario, profile.model_copy(update={"round_trip_ns": profile.round_trip_ns / speed})


def _precision(change: Callable[[PrecisionFit, float], Mapping[str, Any]]) -> Faster:
    def faster(scenario: Any, profile: TrainingProfile, speed: float) -> tuple[Any, TrainingProfile]:
        fits = {name: fit.model_copy(update=change(fit, speed)) for name, fit in profile.precisions.items()}
        return scenario, profile.model_copy(update={"precisions": fits})

    return faster


def _launches(parts: tuple[str, ...]) -> Callable[[PrecisionFit, float], Mapping[str, Any]]:
    def one(launches: Launches, speed: float) -> Launches:
        return launches.model_copy(update={"host": _divided(launches.host, _HOST, speed)})

    def change(fit: PrecisionFit, speed: float) -> Mapping[str, Any]:
        tables = fit.host.items()
        return {
            "host": {
                kind: {name: one(each, speed) if name in parts else each for name, each in table.items()}
                for kind, table in tables
            }
        }

    return change


def _passes(parts: tuple[str, ...]) -> Callable[[PrecisionFit, float], Mapping[str, Any]]:
    def change(fit: PrecisionFit, speed: float) -> Mapping[str, Any]:
        device = {
            name: curve.model_copy(
                update={"ns": [ns / speed for ns in curve.ns], "token_ns": [ns / speed for ns in curve.token_ns]}
            )
            if name in parts
            else curve
            for name, curve in fit.device.items()
        }
        added = {name: ns / speed if name in parts else ns for name, ns in fit.accumulate_ns.items()}
        return {"device": device, "accumulate_ns": added, **_recomputed(fit, parts, speed)}

    return change


def _recomputed(fit: PrecisionFit, parts: tuple[str, ...], speed: float) -> dict[str, float]:
    """Layers that are computed anew are part of the backward pass, but `recompute` is in units of the forward's."""
    return {"recompute": fit.recompute * speed if "layers" in parts else fit.recompute / speed}


def _optimizer_host(fit: PrecisionFit, speed: float) -> Mapping[str, Any]:
    def one(each: OptimizerFit) -> OptimizerFit:
        host, freed = _divided(each.host, _HOST, speed), _divided(each.zero_grad, _HOST, speed)
        return each.model_copy(update={"host": host, "zero_grad": freed})

    return {"optimizers": {name: one(each) for name, each in fit.optimizers.items()}}


def _optimizer_device(fit: PrecisionFit, speed: float) -> Mapping[str, Any]:
    optimizers = {
        name: each.model_copy(update={"device_ns": each.device_ns / speed}) for name, each in fit.optimizers.items()
    }
    return {"optimizers": optimizers}


def _faster_table(scenario: DynamicScenario, costs: None, speed: float) -> tuple[DynamicScenario, None]:
    """The user's own table: every time of it."""
    assert scenario.costs is not None
    table = {size: _faster_time(time, speed) for size, time in scenario.costs.batch_ms.items()}
    return scenario.model_copy(update={"costs": scenario.costs.model_copy(update={"batch_ms": table})}), costs


def _faster_time(time: ServiceTime, speed: float) -> ServiceTime:
    if isinstance(time, float):
        return time / speed
    # The bins that a distribution is drawn from are samples that give the same bins.
    return Samples.model_construct(samples=tuple((time.bins_ms() / speed).tolist()))
