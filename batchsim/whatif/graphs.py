"""The same step with its kernels captured in a graph, or launched one by one."""

from __future__ import annotations

from collections.abc import Sequence

from batchsim.learned import Copy, Kernels, Operation, Wait, Work
from batchsim.whatif.replay import LAUNCHED

# Host work this long between two launches is somebody's own, and no part of a forward that could be captured.
LAUNCHING_NS = 200_000
# Between a graph's nodes, what of the traced gaps is not the profiler's; and the host's time of one launch by a
# framework, an operator and its modules included. Both of loops that were run with graphs and without
# (calibration/validation/learn/fit).
NODE_GAP_NS = 350
LAUNCH_HOST_NS = 15_000
MIN_KERNELS = 8


def has_graphs(steps: Sequence[Sequence[Operation]]) -> bool:
    """Whether a step launches a graph."""
    return any(isinstance(operation, Kernels) and operation.nodes for step in steps for operation in step)


def captured(steps: Sequence[Sequence[Operation]], queued_gap_ns: int) -> list[list[Operation]] | None:
    """The steps with the longest run of launches in each as one graph of one stream; None: there is none worth it.

    `queued_gap_ns`: what is in a kernel's device time for the gap after it.
    """
    made = [_captured(list(step), queued_gap_ns) for step in steps]
    return None if any(step is None for step in made) else [step for step in made if step is not None]


def _captured(step: list[Operation], queued_gap_ns: int) -> list[Operation] | None:
    first, last = _longest_run(step)
    run = step[first : last + 1]
    kernels = [operation for operation in run if isinstance(operation, Kernels)]
    count = sum(len(operation.device_ns) for operation in kernels)
    if count < MIN_KERNELS:
        return None
    device_ns = sum(sum(operation.device_ns) for operation in kernels) + (NODE_GAP_NS - queued_gap_ns) * count
    copies = [operation for operation in run if isinstance(operation, Copy)]
    device_ns += sum(operation.device_ns for operation in copies)
    graph = Kernels(
        phase=kernels[0].phase,
        stream=kernels[0].stream,
        host_ns=[0],
        events=[0],
        device_ns=[max(device_ns, 1)],
        nodes=count + len(copies),
    )
    return _replaced(step, first, last, [graph])


def _longest_run(step: Sequence[Operation]) -> tuple[int, int]:
    """The first and the last operation of the run with most kernels: launches, little host work, copies on the
    device."""
    best, most = (0, -1), 0
    first, count, last = 0, 0, -1
    for i, operation in enumerate(step):
        if isinstance(operation, Kernels):
            if not count:
                first = i
            count, last = count + len(operation.device_ns), i
            if count > most:
                best, most = (first, last), count
        elif not _within(operation):
            count = 0
    return best


def _within(operation: Operation) -> bool:
    if isinstance(operation, Work):
        return operation.ns <= LAUNCHING_NS
    return isinstance(operation, Copy) and operation.direction == "d2d"


def one_by_one(steps: Sequence[Sequence[Operation]], launch_host_ns: float = LAUNCH_HOST_NS) -> list[list[Operation]]:
    """The steps with each graph's kernels launched one after the other, at so much host time each, traced."""
    made: list[list[Operation]] = []
    for step in steps:
        operations = list(step)
        for i, operation in enumerate(operations):
            if isinstance(operation, Kernels) and operation.nodes:
                nodes = operation.nodes
                each = {"host_ns": [round(launch_host_ns)] * nodes, "events": [0] * nodes}
                each["device_ns"] = [max(round(operation.device_ns[0] / nodes), 0)] * nodes
                operations[i] = operation.model_copy(update={**each, "nodes": None, "phase": LAUNCHED})
        made.append(operations)
    return made


def _replaced(step: list[Operation], first: int, last: int, by: list[Operation]) -> list[Operation]:
    """`by` in the place of operations first to last; waits keep their targets."""
    shift = len(by) - (last + 1 - first)

    def at(target: int) -> int:
        return first if first <= target <= last else target + shift if target > last else target

    made = [*step[:first], *by, *step[last + 1 :]]
    return [o.model_copy(update={"target": at(o.target)}) if isinstance(o, Wait) else o for o in made]
