"""The same step under another schedule: what of it goes, what comes, and what waits for what.

Asynchronous batching is what an engineer would make of the loop: inputs are written into pinned memory and copied
without blocking on a stream of their own, results are copied out on another as soon as they are there, and the host
reads those of a step when it has launched the next one. What the host reads midway, to decide what to launch, stays
where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from batchsim.learned import Copy, Direction, Kernels, Operation, Step, StreamWait, Wait, Work
from batchsim.whatif.replay import ADDED

# Streams that the asynchronous schedule adds.
COPY_IN, COPY_OUT = 1001, 1002
SMALL_BYTES = 65_536  # Up to here a blocking copy is an input among others, and goes with the others in one copy.
PINNED_BYTES_PER_NS = 50.0  # A copy from pinned memory over PCIe 5 x16; measured in calibration/profiles (copies).
# Host time that the asynchronous schedule adds to a step, nanoseconds: two pairs of buffers in turn, three events
# recorded and two waited for on streams, copies issued. About what the host-bound pairs of calibration/pairs cost more
# in their asynchronous twins.
MACHINERY_NS = 60_000
COPY_CALL_NS = 8_000
# Kernels that carry a step's results over to the inputs of the next, on the device: transformers launches 8. In a
# graph they are nodes more; launched one by one they cost the host what its other launches do.
FEEDBACK_KERNELS, FEEDBACK_NS = 8, 2_000

Steps = list[list[Operation]]


def plain(steps: Sequence[Step]) -> Steps:
    return [list(step.operations) for step in steps]


def final_waits(step: Sequence[Operation]) -> list[int]:
    """The waits after the last launch of kernels: those that the next step is prepared behind."""
    last = max((i for i, operation in enumerate(step) if isinstance(operation, Kernels)), default=-1)
    return [i for i, operation in enumerate(step) if isinstance(operation, Wait) and i > last]


def is_overlapped(steps: Sequence[Sequence[Operation]]) -> bool:
    """Whether the host reads a step's results when it has launched a later one already, in most of the steps."""
    late = sum(_lag(step) >= 1 for step in steps)
    return 2 * late > len(steps)


def _lag(step: Sequence[Operation]) -> int:
    finals = final_waits(step)
    if not finals:
        return 1  # It never waits.
    return min(operation.lag for i in finals if isinstance(operation := step[i], Wait))


def synchronous(steps: Sequence[Sequence[Operation]]) -> Steps:
    """The host waits for each step before it prepares the next."""
    if not is_overlapped(steps):
        return [list(step) for step in steps]
    return [[_at_once(operation, i) for i, operation in enumerate(step)] for step in steps]


def _at_once(operation: Operation, place: int) -> Operation:
    """A wait for an earlier step's operation waits for this step's; where that comes later, for nothing."""
    if isinstance(operation, Wait) and operation.lag and operation.target < place:
        return operation.model_copy(update={"lag": 0})
    return operation


def asynchronous(steps: Sequence[Sequence[Operation]]) -> Steps:
    """The host launches a step before it reads the one before."""
    if is_overlapped(steps):
        return [list(step) for step in steps]
    made = [_deferred(list(step)) for step in steps]
    for i, step in enumerate(made):
        wait = step[-1]
        step[-1] = wait.model_copy(update={"target": len(made[i - 1]) - 2})
    return made


def _deferred(step: list[Operation]) -> list[Operation]:
    first = next((i for i, operation in enumerate(step) if isinstance(operation, Kernels)), len(step))
    finals = set(final_waits(step))
    gone: set[int] = set(finals)
    results: list[Copy] = []
    inputs: list[Copy] = []
    streams = _kernel_streams(step)
    for i, operation in enumerate(step):
        if not isinstance(operation, Copy):
            continue
        if operation.direction == "h2d":
            inputs.append(operation)
            gone.add(i)
            if operation.waits and operation.bytes <= SMALL_BYTES:
                gone |= _staged(step, i)
        elif operation.direction == "d2h" and (i < first or any(_awaits(step[w], i) for w in finals)):
            results.append(operation)
            gone.add(i)
    gone |= {
        i
        for i, operation in enumerate(step)
        if isinstance(operation, Wait) and operation.lag == 0 and operation.target in gone
    }
    made: list[Operation] = []
    place: dict[int, int] = {}
    sent = not inputs
    for i, operation in enumerate(step):
        if not sent and isinstance(operation, Kernels):
            made += _send(inputs, streams)
            sent = True
        if i in gone:
            continue
        if isinstance(operation, Wait) and operation.lag == 0:
            operation = operation.model_copy(update={"target": place[operation.target]})
        place[i] = len(made)
        made.append(operation)
    made += _feedback(step)
    made.append(Work(phase=ADDED, ns=MACHINERY_NS, events=0))
    made += _ordered([COPY_OUT], streams)
    out = sum(copy.bytes for copy in results)
    made.append(_pinned("d2h", out, COPY_OUT))
    made.append(Wait(phase="wait", lag=1, target=0, host_ns=_own(step, finals), events=1, waited_ns=0))
    return made


def _feedback(step: Sequence[Operation]) -> list[Operation]:
    """The kernels that feed results back, launched as the step's others are, one by one."""
    single = [operation for operation in step if isinstance(operation, Kernels) and operation.nodes is None]
    if any(isinstance(operation, Kernels) and operation.nodes for operation in step) or not single:
        return []
    host = [ns for operation in single for ns in operation.host_ns]
    events = [count for operation in single for count in operation.events]
    kernels = Kernels(
        phase="feedback",
        stream=single[-1].stream,
        host_ns=[round(median(host))] * FEEDBACK_KERNELS,
        events=[round(median(events))] * FEEDBACK_KERNELS,
        device_ns=[FEEDBACK_NS] * FEEDBACK_KERNELS,
    )
    return [kernels]


def _own(step: Sequence[Operation], finals: set[int]) -> int:
    return max((operation.host_ns for i in finals if isinstance(operation := step[i], Wait)), default=0)


def _awaits(operation: Operation, target: int) -> bool:
    return isinstance(operation, Wait) and operation.lag == 0 and operation.target == target


def _staged(step: Sequence[Operation], copied: int) -> set[int]:
    """The copy on the device that puts a small input where it belongs, if one follows."""
    bytes_ = step[copied].bytes  # type: ignore[union-attr]
    for i in range(copied + 1, min(copied + 4, len(step))):
        operation = step[i]
        if isinstance(operation, Copy) and operation.direction == "d2d" and operation.bytes == bytes_:
            return {i}
        if isinstance(operation, Kernels | Copy):
            break
    return set()


def _send(inputs: Sequence[Copy], streams: Sequence[int]) -> list[Operation]:
    """The inputs in pinned memory, and in one copy but for the large ones; kernels wait for them."""
    made: list[Operation] = []
    if small := sum(copy.bytes for copy in inputs if copy.bytes <= SMALL_BYTES):
        made.append(_pinned("h2d", small, COPY_IN))
    made += [_pinned("h2d", copy.bytes, COPY_IN) for copy in inputs if copy.bytes > SMALL_BYTES]
    return [*made, *_ordered(streams, [COPY_IN])]


def _kernel_streams(step: Sequence[Operation]) -> list[int]:
    return list(dict.fromkeys(operation.stream for operation in step if isinstance(operation, Kernels)))


def _ordered(streams: Sequence[int], on: Sequence[int]) -> list[Operation]:
    return [StreamWait(phase=ADDED, stream=stream, on=other, host_ns=0, events=0) for stream in streams for other in on]


def _pinned(direction: Direction, bytes_: int, stream: int) -> Copy:
    device_ns = 2_000 + round(bytes_ / PINNED_BYTES_PER_NS)
    return Copy(
        phase=ADDED,
        stream=stream,
        direction=direction,
        bytes=bytes_,
        pinned=True,
        waits=False,
        host_ns=COPY_CALL_NS,
        events=0,
        device_ns=device_ns,
    )
