"""What waits are for in steps that are replayed in another order than they were traced in.

Learned steps are replayed one after the other and over again: the last of them comes before the first, and the one
after a step that was left out follows the one before it. A wait for an earlier step's operation then waits for the one
that stands for it there.
"""

from __future__ import annotations

from collections.abc import Sequence

from batchsim.learned import Copy, Kernels, Operation, Wait


def in_a_row(steps: Sequence[Sequence[Operation]], chosen: Sequence[int]) -> list[list[Operation]]:
    """The `chosen` of all traced `steps`, by their numbers, each after the one chosen before and the first after the
    last."""
    return [
        [_redirected(operation, number, place, steps, chosen) for operation in steps[number]]
        for place, number in enumerate(chosen)
    ]


def _redirected(
    operation: Operation, number: int, place: int, steps: Sequence[Sequence[Operation]], chosen: Sequence[int]
) -> Operation:
    if not isinstance(operation, Wait) or not operation.lag:
        return operation
    traced, replayed = number - operation.lag, chosen[(place - operation.lag) % len(chosen)]
    if traced == replayed:
        return operation
    return operation.model_copy(update={"target": _counterpart(steps[traced], operation.target, steps[replayed])})


def _counterpart(step: Sequence[Operation], target: int, other: Sequence[Operation]) -> int:
    """Which operation of `other` is what `target` is of `step`: the same, counted from the end among its like."""
    like = [place for place, operation in enumerate(other) if _kind(operation) == _kind(step[target])]
    after = sum(_kind(operation) == _kind(step[target]) for operation in step[target + 1 :])
    if like:
        return like[max(len(like) - 1 - after, 0)]
    launched = [place for place, operation in enumerate(other) if isinstance(operation, Kernels | Copy)]
    return launched[-1] if launched else target


def _kind(operation: Operation) -> tuple[object, ...]:
    if isinstance(operation, Copy):
        return Copy, operation.direction, operation.stream
    return (Kernels, operation.stream) if isinstance(operation, Kernels) else (type(operation),)
