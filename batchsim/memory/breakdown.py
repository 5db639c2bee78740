"""What fits on a device: where a program's memory goes, the largest batch, and what is in the way of a larger one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from batchsim.errors import InputError
from batchsim.memory.allocator import OutOfMemoryError, Usage, fits, play
from batchsim.memory.overheads import Library
from batchsim.memory.tape import Tape

ROUNDING, CACHED, FRAMEWORK = "rounding", "cached", "framework"
PROBE = 9
OVERHEADS = (ROUNDING, CACHED, FRAMEWORK)
DEFINITIONS = {
    "parameters": "the weights",
    "gradients": "of the weights, kept until the optimiser step",
    "optimiser state": "what the optimiser keeps of each weight",
    "KV cache": "keys and values of running requests, in whole blocks",
    "residual stream": "activations between layers; with checkpointing all that is kept of a layer",
    "norms": "activations that norms keep and give, under autocast with their casts",
    "attention": "activations of attention: queries, keys, values, result",
    "MLP": "activations of MLPs",
    "cached casts": "weights that autocast has cast",
    "activations": "buffers between kernels",
    "logits": "scores of the vocabulary; in training also their logarithms and gradients, in float32",
    "temporaries": "gradients of activations, and what kernels take for a moment",
    "inputs": "tokens, positions, block tables, images, answers",
    "workspace": "of matrix products, for each stream that runs them",
    ROUNDING: "what blocks of the allocator are larger than what was asked for",
    CACHED: "reserved by the allocator beyond the peak of what is allocated: freed blocks, and pieces that fit nothing",
    FRAMEWORK: "CUDA context, kernels, libraries and instantiated graphs, beside the allocator",
}


@dataclass(frozen=True, slots=True)
class Need:
    """A program whose memory depends on a batch.

    `key` is what a scenario calls the batch, `batch` its value and `tape` its tape; `tape_of` gives that of any batch
    of the `sizes` that it may have, which rise. `framework` are bytes beside the allocator. `relief`: by what could be
    changed, tapes of the program so changed.
    """

    title: str
    key: str
    batch: int
    sizes: Sequence[int]
    tape: Tape
    tape_of: Callable[[int], Tape]
    framework: int = 0
    relief: Mapping[str, Callable[[int], Tape]] = field(default_factory=dict)

    def largest(self, device_bytes: int, tape_of: Callable[[int], Tape] | None = None) -> int:
        """The largest batch that fits a device, 0 if none does."""
        tape_of = tape_of or self.tape_of
        capacity = device_bytes - self.framework
        # Memory is close to linear in the batch: two batches tell about where the edge is.
        first, second = (play(tape_of(batch)).reserved for batch in (1, PROBE))
        guess = 1 + (capacity - first) * (PROBE - 1) // max(1, second - first)
        place = bisect_right(self.sizes, guess)
        found = largest(lambda i: fits(tape_of(self.sizes[i - 1]), capacity), len(self.sizes), place)
        return self.sizes[found - 1] if found else 0

    def next(self, batch: int) -> int:
        """The size after `batch`, or after none (0)."""
        return self.sizes[bisect_right(self.sizes, batch)]


def largest(fits: Callable[[int], bool], most: int, guess: int = 1) -> int:
    """The largest of 1 to `most` that fits, where all below it fit too, except perhaps below `most`; 0 if none does.

    The search begins at `guess`, and is short where that is near.
    """
    if fits(most):
        return most
    below, above, step = 0, most, 1
    at = min(max(guess, 1), most - 1)
    while below < at < above:
        if fits(at):
            below, at = at, at + step if above == most else at
        else:
            above, at = at, at - step if below == 0 else at
        step *= 2
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if fits(middle) else (below, middle)
    return below


@dataclass(frozen=True)
class Breakdown:
    """Where a program's memory goes on a device of `device_bytes`.

    `terms` add up to `total_bytes`, which exceeds the device just where `fits` is false: what the allocator holds at
    its peak, which is reached in `phase`, what it reserves beyond that, and the framework. `allocated_bytes` is torch's
    `max_memory_allocated`, `reserved_bytes` its `max_memory_reserved`. `largest` is the largest batch that fits, None
    where no batch in sight is too large; `wall` is the largest term of the first that does not; `grows` what one more
    adds to each term. `relief` names changes after which a larger batch fits, and that batch.
    """

    title: str
    key: str
    batch: int
    device_bytes: int
    terms: Mapping[str, int]
    phase: str
    allocated_bytes: int
    reserved_bytes: int
    fits: bool
    largest: int | None
    wall: str | None
    grows: Mapping[str, int]
    relief: Mapping[str, int]

    @cached_property
    def total_bytes(self) -> int:
        return sum(self.terms.values())

    def to_json(self) -> dict[str, Any]:
        """All figures as plain data; sizes in bytes."""
        return {
            "title": self.title,
            "batch": {self.key: self.batch},
            "device_bytes": self.device_bytes,
            "total_bytes": self.total_bytes,
            "allocated_bytes": self.allocated_bytes,
            "reserved_bytes": self.reserved_bytes,
            "terms": dict(self.terms),
            "phase": self.phase,
            "fits": self.fits,
            "largest": self.largest,
            "wall": self.wall,
            "grows": dict(self.grows),
            "relief": dict(self.relief),
        }

    @property
    def sentence(self) -> str:
        """The total and its largest terms."""
        ranked = sorted(self.terms.items(), key=lambda term: -term[1])
        told = ", ".join(f"{name} {gigabytes(size)}" for name, size in ranked[:4])
        rest = sum(size for _, size in ranked[4:])
        return f"{gigabytes(self.total_bytes)}: {told}" + (f", the rest {gigabytes(rest)}" if rest else "")

    def check(self) -> None:
        """Refuse a program that does not fit.

        Raises:
            InputError: without a file; `InputError.within` adds it. Names the largest terms, and what would fit.
        """
        if self.fits:
            return
        wanted = f"at most {self.largest:,}" if self.largest else "a smaller model"
        wanted += f", what fits the device's {gigabytes(self.device_bytes)}"
        for change, batch in self.relief.items():
            wanted += f"; with {change} {batch:,}"
        raise InputError(None, self.key, f"{self.batch:,}, which takes {self.sentence}", wanted)


def break_down(need: Need, device_bytes: int) -> Breakdown:
    """Where the memory of `need` goes."""
    usage, fitting = usage_of(need, device_bytes)
    found = need.largest(device_bytes)
    wall = None
    if found < need.sizes[-1]:
        beyond = terms_of(play(need.tape_of(need.next(found))), need.framework)
        wall = max((term for term in beyond if term not in OVERHEADS), key=lambda term: beyond[term])
    terms = terms_of(usage, need.framework)
    one, more = (terms_of(play(need.tape_of(batch)), need.framework) for batch in (need.batch, need.batch + 1))
    grows = {term: size - one.get(term, 0) for term, size in more.items() if term != CACHED}
    relief = {change: need.largest(device_bytes, tape_of) for change, tape_of in need.relief.items()}
    return Breakdown(
        need.title, need.key, need.batch, device_bytes, terms, usage.phase, usage.allocated, usage.reserved, fitting,
        None if found == need.sizes[-1] else found, wall,
        {term: size for term, size in grows.items() if size > 0},
        {change: batch for change, batch in relief.items() if batch > found},
    )  # fmt: skip


def usage_of(need: Need, device_bytes: int) -> tuple[Usage, bool]:
    """What the program takes, and whether the device has it; of one that does not fit, what it would take."""
    try:
        return play(need.tape, device_bytes - need.framework), True
    except OutOfMemoryError:
        return play(need.tape), False


def terms_of(usage: Usage, framework: int) -> dict[str, int]:
    """All that a process takes of the device, by term, in the order of `DEFINITIONS`."""
    found: dict[str, int] = {
        **dict(usage.terms.items()),
        ROUNDING: usage.rounding,
        CACHED: usage.reserved - usage.allocated,
    }
    found[FRAMEWORK] = framework
    return {term: found[term] for term in DEFINITIONS if found.get(term)}


def framework_of(library: Library, kernels: int = 0) -> int:
    """Bytes beside the allocator, with graphs of `kernels` kernels in all."""
    return library.context + kernels * library.graph_kernel


def gigabytes(size: int) -> str:
    """As people read it; 1 GB is 10^9 bytes."""
    return f"{size / 1e9:,.3g} GB" if size < 1e12 else f"{size / 1e9:,.0f} GB"
