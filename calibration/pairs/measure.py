"""One pair on the device at hand: step times of both loops by turns, and later a trace of each.

What a profiler attaches may stay attached when it has gone, and makes launches longer: all pairs of a process are
timed before the first one is traced.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

import calibration
from batchsim.errors import RunError
from batchsim.files import write_json
from calibration.pairs.lab import Lab
from calibration.pairs.loop import Annotation, Loop, Pair
from calibration.provenance import host_yardstick_ns, provenance

Floats = npt.NDArray[np.float64]

WARMUP = 10  # steps that do not count, at the beginning of each turn


class Runner:
    """Runs a loop's steps, in pieces, without leaving any number out."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.done = 0

    def run(self, steps: int, before: Callable[[], None] = lambda: None) -> None:
        """`steps` more steps, each after `before`."""
        for step in range(self.done, self.done + steps):
            before()
            self.loop.step(step)
        self.done += steps

    def times_ms(self, steps: int, period: int) -> Floats:
        """Wall times of steps, from begin to begin, after some that do not count: means over `period` of them."""
        self.run(WARMUP)
        starts: list[int] = []
        self.run(steps + 1, lambda: starts.append(time.perf_counter_ns()))
        self.loop.finish()
        times = np.diff(np.array(starts)) / 1e6
        return np.convolve(times, np.ones(period) / period, "valid")


def measure(
    pair: Pair, device: str, out: Path, *, rounds: int = 3, steps: int = 60, turn_ms: float = 200
) -> dict[str, Any]:
    """Time both loops by turns, and write `NAME.json` to `out`; its content: step times in milliseconds, `gain` (how
    much shorter the asynchronous step is, as a fraction of the synchronous one), and whether both computed the same.

    A turn of a loop takes at least `steps` steps and `turn_ms`, unless that would be more than 500 steps.
    """
    runners = {"sync": Runner(pair.sync(Lab(device))), "async": Runner(pair.twin(Lab(device)))}
    times: dict[str, list[Floats]] = {"sync": [], "async": []}
    yardsticks = []
    rough_ms = max(float(np.median(runner.times_ms(WARMUP, 1))) for runner in runners.values())
    steps = max(steps, round(min(turn_ms / rough_ms, 500)))
    gc.collect()
    for _ in range(rounds):
        yardsticks.append(host_yardstick_ns())
        for way, runner in runners.items():
            times[way].append(runner.times_ms(steps, pair.period))
    found = {
        "name": pair.name,
        "description": pair.description,
        "outlook": pair.outlook,
        "annotation": pair.annotation,
        "period": pair.period,
        **{key: value for way in runners for key, value in _told(way, times[way]).items()},
        "gain": _gain(times),
        "gain_by_round": [_gain({way: [taken[way]] for way in taken}) for taken in _rounds(times)],
        **_equality(runners["sync"].loop.outputs, runners["async"].loop.outputs),
        "host_yardstick_ns": yardsticks,
        "versions": provenance(device, f"python -m calibration.pairs run --only {pair.name}"),
    }
    write_json(out / f"{pair.name}.json", found)
    return found


def trace_both(pair: Pair, device: str, out: Path, steps: int = 10) -> None:
    """Write `NAME_sync.trace.json.gz` and `NAME_async.trace.json.gz` to `out`, `steps` steady steps each."""
    for loop, path in zip((pair.sync, pair.twin), traces_of(pair, out), strict=True):
        trace(Runner(loop(Lab(device))), pair.annotation, path, steps)


def traces_of(pair: Pair, out: Path) -> list[Path]:
    """Where a pair's traces are, the synchronous loop's first."""
    return [out / f"{pair.name}_{way}.trace.json.gz" for way in ("sync", "async")]


def trace(runner: Runner, annotation: Annotation, path: Path, steps: int) -> None:
    """Trace `steps` steady steps into `path`, marked as `annotation` says."""
    loop, activities = runner.loop, [ProfilerActivity.CPU]
    if loop.lab.on_gpu:
        activities.append(ProfilerActivity.CUDA)
    runner.run(WARMUP)
    idle, marks = loop.phase, record_function
    if annotation == "record":
        # On a CPU there are no device events, which it says.
        told = contextlib.nullcontext() if loop.lab.on_gpu else contextlib.suppress(RunError)
        with told, calibration.record(path, traced=steps) as recording:
            loop.phase = recording.phase
            runner.run(recording.wanted, recording.step)
    elif annotation == "steps":
        with profile(activities=activities, schedule=schedule(wait=0, warmup=3, active=steps, repeat=1)) as profiler:
            for _ in range(3 + steps):
                runner.run(1)
                profiler.step()
        profiler.export_chrome_trace(str(path))
    else:
        with profile(activities=activities) as profiler:
            for _ in range(steps):
                step: AbstractContextManager[Any] = contextlib.nullcontext()
                if annotation == "own":
                    loop.phase, step = marks, record_function("serve_step")
                with step:
                    runner.run(1)
        profiler.export_chrome_trace(str(path))
    loop.phase = idle
    loop.finish()


def _told(way: str, rounds: list[Floats]) -> dict[str, Any]:
    together = np.concatenate(rounds)
    return {
        f"{way}_step_ms": [float(np.median(times)) for times in rounds],
        f"{way}_mean_ms": [float(times.mean()) for times in rounds],
        f"{way}_p10_ms": float(np.quantile(together, 0.1)),
        f"{way}_p90_ms": float(np.quantile(together, 0.9)),
    }


def _rounds(times: dict[str, list[Floats]]) -> list[dict[str, Floats]]:
    return [dict(zip(times, taken, strict=True)) for taken in zip(*times.values(), strict=True)]


def _gain(times: dict[str, list[Floats]]) -> float:
    """How much shorter the asynchronous step is, as a fraction of the synchronous one; medians of medians."""
    medians = {way: float(np.median([np.median(taken) for taken in rounds])) for way, rounds in times.items()}
    return 1 - medians["async"] / medians["sync"]


def _equality(sync: list[Any], late: list[Any]) -> dict[str, Any]:
    """Whether the loops computed the same, step by step."""
    equal = [same(a, b) for a, b in zip(sync, late, strict=True)]
    return {
        "equal_outputs": all(equal),
        "outputs_compared": len(equal),
        "first_difference": None if all(equal) else equal.index(False),
    }


def same(a: Any, b: Any) -> bool:
    """Whether two outputs are equal; floating-point sums may differ in their last digits."""
    if isinstance(a, float):
        return bool(np.isclose(a, b, rtol=1e-4, atol=1e-6))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def usable(device: str) -> bool:
    """Whether the device still answers: after a fault on it, no later call of the process succeeds."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
