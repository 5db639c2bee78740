"""The same step with its kernels captured in a graph, or launched one by one."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from batchsim.learned import Copy, Kernels, Operation, Wait, Work

# Host work this long between two launches is somebody's own, and no part of a forward that could be captured.
LAUNCHING_NS = 200_000
# A kernel's gap before the next in a graph is this much shorter than on a stream that the host feeds.
SAVED_GAP_NS = 500
# Host time of one launch by a framework, where a trace shows none: an operator, its allocation and the call;
# nanoseconds. Measured on transformers' decoders, 16,000 to 20,000; on bare torch modules 6,000 to 12,000.
LAUNCH_HOST_NS = 12_000
MIN_KERNELS = 8


def has_graphs(steps: Sequence[Sequence[Operation]]) -> bool:
    """Whether a step launches a graph."""
    return any(isinstance(operation, Kernels) and operation.nodes for step in steps for operation in step)


def captured(steps: Sequence[Sequence[Operation]]) -> list[list[Operation]] | None:
    """The steps with the longest run of launches in each as one graph; None: there is none worth it."""
    made = [_captured(list(step)) for step in steps]
    return None if any(step is None for step in made) else [step for step in made if step is not None]


def _captured(step: list[Operation]) -> list[Operation] | None:
    first, last = _longest_run(step)
    run = step[first : last + 1]
    kernels = [operation for operation in run if isinstance(operation, Kernels)]
    count = sum(len(operation.device_ns) for operation in kernels)
    if count < MIN_KERNELS:
        return None
    device_ns = sum(sum(operation.device_ns) for operation in kernels) - SAVED_GAP_NS * count
    device_ns += sum(operation.device_ns for operation in run if isinstance(operation, Copy))
    graph = Kernels(
        phase=kernels[0].phase,
        stream=kernels[0].stream,
        host_ns=[0],
        events=[0],
        device_ns=[max(device_ns, 1)],
        nodes=len(run) - len(kernels) + count,
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
                each["device_ns"] = [max(round(operation.device_ns[0] / nodes), 0) + SAVED_GAP_NS] * nodes
                operations[i] = operation.model_copy(update={**each, "nodes": None})
        made.append(operations)
    return made


def launch_cost_ns(steps: Sequence[Sequence[Operation]]) -> float | None:
    """Host time of one launch as traced, with the profiler's share; None: a trace with few launches."""
    single = [o for step in steps for o in step if isinstance(o, Kernels) and o.nodes is None]
    host = [ns for operation in single for ns in operation.host_ns]
    return float(median(host)) if len(host) >= MIN_KERNELS * len(steps) else None


def _replaced(step: list[Operation], first: int, last: int, by: list[Operation]) -> list[Operation]:
    """`by` in the place of operations first to last; waits keep their targets."""
    shift = len(by) - (last + 1 - first)

    def at(target: int) -> int:
        return first if first <= target <= last else target + shift if target > last else target

    made = [*step[:first], *by, *step[last + 1 :]]
    return [o.model_copy(update={"target": at(o.target)}) if isinstance(o, Wait) else o for o in made]
