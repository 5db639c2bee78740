"""What a program takes of the device's memory and gives back, in order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

# What memory is taken for, in the order of tables and pictures.
Term = Literal[
    "parameters", "gradients", "optimiser state", "KV cache", "residual stream", "norms", "attention", "MLP",
    "cached casts", "activations", "logits", "temporaries", "inputs", "workspace",
]  # fmt: skip

# Who may take a block again that was given back: one stream, or all the graphs that share a pool.
Pool = str
MAIN, GRAPHS = "main", "graphs"  # the stream that torch begins on; what every graphs' pool begins with


class Allocate(NamedTuple):
    """`number` names the block until it is released; sizes are bytes, as asked for."""

    number: int
    size: int
    term: Term
    pool: Pool


class Release(NamedTuple):
    number: int


class Phase(NamedTuple):
    """What follows belongs to this part of the run."""

    name: str


class EmptyCache(NamedTuple):
    """Whole segments that nothing uses go back to the device, as `torch.cuda.empty_cache` gives them back."""


Event = Allocate | Release | Phase | EmptyCache


@dataclass(slots=True)
class Tape:
    """A program's allocations and releases, written down as it makes them."""

    events: list[Event] = field(default_factory=list)
    _count: int = 0

    def new(self, term: Term, size: int, pool: Pool = MAIN) -> int:
        """Take `size` bytes; the block's number. An empty tensor takes none, but has a number."""
        self._count += 1
        if size:
            self.events.append(Allocate(self._count, size, term, pool))
        return self._count

    def free(self, *numbers: int) -> None:
        """Give blocks back; one that was empty, or is back already, changes nothing."""
        self.events.extend(map(Release, numbers))

    def briefly(self, term: Term, *sizes: int) -> None:
        """Blocks that are there together, and gone before anything else is taken."""
        self.free(*[self.new(term, size) for size in sizes])

    def phase(self, name: str) -> None:
        self.events.append(Phase(name))

    def empty_cache(self) -> None:
        self.events.append(EmptyCache())
