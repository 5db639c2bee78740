"""Autograd over tensors of which only the sizes are known: what a training program takes, without computing anything.

As in torch, an operation keeps what its gradient will need, tensors live as long as something refers to them, and the
backward pass runs the operations in the opposite order of their making. A storage is given back when Python's last
reference to it goes, as torch's are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from heapq import heappop, heappush

from batchsim.memory.tape import Tape, Term


class Storage:
    """Bytes on the device, until it is forgotten; `viewed` where the tensor in hand is a view of another."""

    __slots__ = ("_number", "_tape", "size", "viewed")

    def __init__(self, tape: Tape, term: Term, size: int, *, viewed: bool = False) -> None:
        self.size, self.viewed = size, viewed
        self._tape = tape
        self._number = tape.new(term, size)

    def __del__(self) -> None:
        self._tape.free(self._number)


class Parameter:
    """A weight; its gradient is taken when it first comes, and added to afterwards."""

    __slots__ = ("__weakref__", "elements", "grad", "storage")

    def __init__(self, storage: Storage, elements: int) -> None:
        self.elements, self.storage = elements, storage
        self.grad: Storage | None = None


Saved = Callable[[], Storage]
# Takes the gradient of the output, returns those of the inputs; an input that needs none has no place among them.
Backward = Callable[[Storage], Sequence[Storage]]


class Node:
    """An operation that was done: where its gradients go, and how they are made."""

    __slots__ = ("backward", "inputs", "number")

    def __init__(self, number: int, inputs: tuple[Node | Parameter, ...], backward: Backward) -> None:
        self.number, self.inputs = number, inputs
        self.backward: Backward | None = backward


@dataclass(frozen=True, slots=True)
class Tensor:
    """A result, of elements of `width` bytes, and the operation that its gradient goes to."""

    storage: Storage
    width: int
    source: Node

    @property
    def size(self) -> int:
        return self.storage.size


@dataclass(slots=True)
class Graph:
    """Does operations, and runs them backwards.

    Torch runs them backwards on a thread of its own, and each thread that multiplies matrices takes a workspace of
    `product_workspace` bytes behind its first result, which it keeps: a handle of cuBLAS belongs to a thread
    (ATen/cuda/CublasHandlePool.cpp).
    """

    tape: Tape
    product_workspace: int = 0
    frame: Frame | None = None
    _made: int = 0
    _thread: str = "forward"
    _multiplied: set[str] = field(default_factory=set)

    def operation(
        self, term: Term, size: int, width: int, gradients: Sequence[tuple[Tensor | Parameter, Term, int]], *,
        kept: Iterable[Storage] = (), also: Iterable[int] = (), keeps_result: bool = False, product: bool = False,
        backward_workspace: Iterable[int] = (),
    ) -> Tensor:  # fmt: skip
        """An operation whose result takes `size` bytes.

        `gradients` are its inputs, with what the gradient of each takes, in the order in which those are made. `kept`
        are storages that making them needs; `also` are sizes that are made and kept with the result, which may be, too.
        A matrix `product` also takes the thread's workspace, and its gradients are views.
        """
        saved = [self.keep(storage) for storage in kept]
        result = Storage(self.tape, term, size)
        if product:
            self._multiply()
        saved += [self.keep(Storage(self.tape, term, each)) for each in also]
        if keeps_result:
            saved.append(self.keep(result))
        sizes = [(term, size) for _, term, size in gradients]

        def backward(_: Storage) -> list[Storage]:
            held = [each() for each in saved]
            found = []
            for term, size in sizes:
                found.append(Storage(self.tape, term, size, viewed=product))
                if product:
                    self._multiply()
            self.tape.briefly("temporaries", *backward_workspace)
            del held
            return found

        return self.result(result, width, [each for each, _, _ in gradients], backward)

    def result(self, storage: Storage, width: int, inputs: Iterable[Tensor | Parameter], backward: Backward) -> Tensor:
        """The result of an operation on `inputs` whose gradients are made by `backward`."""
        self._made += 1
        sources = tuple(each if isinstance(each, Parameter) else each.source for each in inputs)
        return Tensor(storage, width, Node(self._made, sources, backward))

    def _multiply(self) -> None:
        if self._thread not in self._multiplied:
            self._multiplied.add(self._thread)
            self.tape.new("workspace", self.product_workspace)

    def keep(self, storage: Storage) -> Saved:
        """What a gradient gets `storage` from later."""
        return (lambda: storage) if self.frame is None else self.frame.keep(storage)

    def checkpoint(self, layer: Callable[[Tensor], Tensor], x: Tensor, end: Callable[[], None]) -> Tensor:
        """`layer` of `x`, of which nothing is kept but `x`: it is computed anew when the first gradient needs it.

        As `torch.utils.checkpoint` without reentrance: that stops at the last thing kept; then `end` is called.
        """
        self.frame = Frame(self, layer, x, end)
        result = layer(x)
        self.frame = None
        return result

    def backward(self, loss: Tensor, gradient: Storage) -> None:
        """Run all nodes that `loss` comes from, the latest first."""
        self._thread = "backward"
        ready: list[tuple[int, Node]] = [(-loss.source.number, loss.source)]
        gradients = {loss.source: gradient}
        del loss, gradient
        while ready:
            _, node = heappop(ready)
            backward, inputs = node.backward, node.inputs
            node.backward, node.inputs = None, ()
            assert backward is not None
            found = list(backward(gradients[node]))
            # The gradient that came goes first, then what was kept.
            del gradients[node]
            del backward, node
            for place in reversed(inputs):
                fresh = found.pop()
                if isinstance(place, Parameter):
                    if place.grad is None:
                        place.grad = fresh
                elif place in gradients:
                    gradients[place] = self.added(gradients[place], fresh)
                else:
                    gradients[place] = fresh
                    heappush(ready, (-place.number, place))
                del fresh
        self._thread = "forward"

    def added(self, gradient: Storage, fresh: Storage) -> Storage:
        """The sum of two gradients: in place of the first, but where that is a view, as what products return is."""
        return Storage(self.tape, "temporaries", fresh.size) if gradient.viewed else gradient


class Stopped(Exception):  # noqa: N818
    """Nothing that was computed anew is needed after this."""


class Frame:
    """A checkpointed part of the program."""

    def __init__(self, graph: Graph, layer: Callable[[Tensor], Tensor], x: Tensor, end: Callable[[], None]) -> None:
        self._graph, self._layer, self._end = graph, layer, end
        self._x, self._width = x.storage, x.width
        self._count = 0
        self._recomputing = False
        self._found: dict[int, Storage] = {}

    def keep(self, storage: Storage) -> Saved:
        if self._recomputing:
            self._found[len(self._found)] = storage
            if len(self._found) == self._count:
                raise Stopped
            return lambda: storage
        self._count += 1
        index = self._count - 1
        return lambda: self._get(index)

    def _get(self, index: int) -> Storage:
        if not self._recomputing:
            self._recomputing = True
            self._graph.frame = self
            with suppress(Stopped):
                self._layer(Tensor(self._x, self._width, Node(0, (), lambda _: ())))
            self._graph.frame = None
            self._end()
        return self._found.pop(index)
