"""A profiler trace of any loop, turned into a profile: which operations a step consists of, and who waits for whom.

Launches are linked to what they put on the device by correlation id, all nodes of a graph to its one launch
(`calibration.linked`); calls are told apart into work, launches, copies and waits (`calibration.reading`). Steps are
cut where the host has waited for most of a step's device work, so that what it does after that (reading results,
preparing the next batch, launching it) stands in one step.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from statistics import median
from typing import Any

from pydantic import ValidationError

from batchsim.errors import shown
from batchsim.learned import Copy, Kernels, LearnedProfile, Operation, Step, Wait, Work
from batchsim.whatif.traced import matched, replay_traced
from calibration import doubts
from calibration.kineto import Trace
from calibration.linked import Linked
from calibration.products import mlp_chains
from calibration.reading import Placed, Reading
from calibration.steps import HOW, MIN_STEPS, Steps, find_steps, refuse
from calibration.targets import in_a_row

MAX_STEPS = 8
OUTLIER = 2.0  # A step this many times as long as the median is not a steady one,
TURNS = 0.25  # unless as many are.
SHORT_NS = 20_000  # Host work this short after a wait is hardly any.
# How far a replay of the traced times may be from the traced steps before it is told, and before it is refused.
TOLD, REFUSED = 0.1, 0.3


def learn(trace: Trace, steady_step_ms: float | None = None) -> LearnedProfile:
    """The profile of the loop in `trace`; `steady_step_ms` is its step without a profiler.

    What `calibration.record` has timed, the step and its phases, is taken from the trace.

    Raises:
        InputError: no steps, no device events, several devices, overlapping steps: what is missing and how to record
        it.
    """
    steps = find_steps(trace)
    if len(steps.starts_ns) - 1 < MIN_STEPS:
        refuse(trace, f"{len(steps.starts_ns) - 1} steps ({steps.found_by})", f"at least {MIN_STEPS}: trace more steps")
    doubtful = doubts.of_ids(trace)
    linked = Linked(trace, steps)
    try:
        placed = Reading(linked).operations()
        doubtful += doubts.of_steps(linked, placed)
        learned = _steps(steps, placed)
    except ValidationError as caught:
        what = caught.errors()[0]
        place = ".".join(map(str, what["loc"]))
        refuse(trace, f"a step whose {place} is {shown(what['input'])}", f"a trace as the profiler wrote it: {HOW}")
    if not learned:
        refuse(trace, f"steps in which nothing takes time ({steps.found_by})", f"steps of a loop: {HOW}")
    learned, factor = matched(learned, linked.launch_ns)
    error = _replay_error(learned, linked.launch_ns)
    if abs(error) > REFUSED:
        wanted = (
            "a trace of one loop's steps in which the host's waits are synchronising calls, with every launch in it"
        )
        refuse(trace, f"steps that a replay of their own calls misses by {error:+.0%}", wanted)
    chains, told = mlp_chains(trace, steps, linked.queued_gap_ns)
    # Where there is none, whoever asks what tiles would give is told why.
    notes = [*linked.notes, *doubtful, *(told if chains else ())]
    if factor != 1.0:
        notes.append(
            f"kernels are taken {factor - 1:+.0%} longer than traced, for their steps to take as long as they did"
        )
    if abs(error) > TOLD:
        notes.append(
            f"a replay of the traced calls misses the traced steps by {error:+.0%}; intervals do not count that"
        )
    recorded = _recorded(trace.extra)
    return LearnedProfile(
        source=trace.source,
        device=trace.device_names[0] if trace.device_names else "unknown device",
        found_by=steps.found_by,
        steps_in_trace=len(steps.starts_ns) - 1,
        steady_step_ms=steady_step_ms or recorded.get("steady_step_ms"),
        launch_ns=linked.launch_ns,
        queued_gap_ns=linked.queued_gap_ns,
        graph_gap_ns=linked.graph_gap_ns,
        replay_error=error,
        dense=linked.dense(),
        attention=linked.attention(),
        chains=chains,
        notes=notes,
        provenance={key: value for key, value in trace.extra.items() if key in _FACTS},
        steps=learned,
    )


_FACTS = ("schemaVersion", "cuda_driver_version", "cuda_runtime_version", "cupti_version")


def _recorded(extra: Mapping[str, Any]) -> dict[str, Any]:
    """What `calibration.record` wrote into the trace, where it is sound."""
    key = extra.get("batchsim")
    step = key.get("steady_step_ms") if isinstance(key, dict) else None
    sound = isinstance(step, int | float) and not isinstance(step, bool) and 0 < step < 1e9
    return {"steady_step_ms": float(step)} if sound and step is not None else {}


def _replay_error(steps: list[Step], launch_ns: int) -> float:
    """How far a replay at the traced times is from the traced steps, relatively."""
    step_ns = replay_traced(steps, launch_ns).step_ns[0]
    return float(step_ns * len(steps) / sum(step.traced_ns for step in steps) - 1)


def _steps(steps: Steps, placed: list[Placed]) -> list[Step]:
    """Cut into steps, with the targets of waits as indices of operations."""
    cuts = _cuts(steps, placed)
    cycles = [placed[a:b] for a, b in pairwise(cuts) if a < b and placed[a].start < placed[b - 1].end]
    where: dict[int, tuple[int, int]] = {}
    for number, cycle in enumerate(cycles):
        for position, item in enumerate(cycle):
            if item.activity >= 0:
                where[item.activity] = number, position
    made: list[tuple[int, list[Operation]]] = []
    unknown: set[int] = set()
    for number, cycle in enumerate(cycles):
        operations: list[Operation] = []
        for item in cycle:
            operation = item.operation
            if isinstance(operation, Wait):
                at = where.get(item.awaits)
                if at is None or at[0] > number:
                    unknown.add(number)
                    operation = Work(
                        phase=operation.phase, ns=operation.host_ns + operation.waited_ns, events=operation.events
                    )
                else:
                    operation = operation.model_copy(update={"lag": number - at[0], "target": at[1]})
            operations.append(operation)
        made.append((cycle[-1].end - cycle[0].start, operations))
    usual = median([ns for ns, _ in made[1:]] or [0])
    steady = [ns <= OUTLIER * usual for ns, _ in made[1:]]
    # Where many are that long, long and short ones take turns.
    turns = sum(steady) <= (1 - TURNS) * len(steady)
    chosen = [number for number, fits in enumerate(steady, 1) if fits or turns]
    # What the first steps wait for may be of steps before the recording.
    sound = next((place for place, number in enumerate(chosen) if number not in unknown), 0)
    chosen = chosen[sound:][:MAX_STEPS]
    operations_of = in_a_row([operations for _, operations in made], chosen)
    return [Step(traced_ns=made[i][0], operations=own) for i, own in zip(chosen, operations_of, strict=True)]


def _cuts(steps: Steps, placed: list[Placed]) -> list[int]:
    """Indices at which a step begins: after the wait that keeps the host most, or where it is annotated to begin.

    That is the one with most device work before it, since the wait before, and most host work behind it, up to the next
    launch of kernels: a wait midway, whose result decides what to launch, is followed by that launch at once.
    """
    bounds = steps.starts_ns.tolist()
    ahead = _host_ahead(placed)
    cuts: list[int] = []
    position = since = 0
    for end in bounds[1:]:
        best, most = -1, 0
        first = position
        while position < len(placed) and placed[position].start < end:
            operation = placed[position].operation
            if isinstance(operation, Kernels):
                since += sum(operation.device_ns)
            elif isinstance(operation, Copy):
                since += operation.device_ns
            elif isinstance(operation, Wait):
                kept = since * (ahead[position] + SHORT_NS)
                if kept > most:
                    best, most = position + 1, kept
                since = 0
            position += 1
        cuts.append(best if best >= 0 else first)
    return cuts


def _host_ahead(placed: list[Placed]) -> list[int]:
    """Of each operation, how long the host works after it until it next launches kernels, nanoseconds."""
    ahead = [0] * len(placed)
    reached = 0
    for i in range(len(placed) - 1, -1, -1):
        ahead[i] = reached
        operation = placed[i].operation
        if isinstance(operation, Kernels):
            reached = 0
        elif isinstance(operation, Work):
            reached += operation.ns
        elif isinstance(operation, Copy):
            reached += operation.host_ns
    return ahead
