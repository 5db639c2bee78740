"""Dependent matrix products in a trace: the MLPs that the tile level knows, with the time that their kernels take.

A product's shape is that of its operator's inputs, which a trace has where it was recorded with shapes; a kernel
belongs to the operator whose external id it or its launch bears, else to the innermost one around its launch. Products
are an MLP where they follow each other on one stream, fit, and have nothing between them but an activation.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchsim.learned import TracedMlp
from calibration.kernel_names import Elementwise, elementwise, is_product, of_sixteen_bits
from calibration.kineto import KINDS, Trace
from calibration.steps import ACTIVITIES, RUNTIME, Steps

OP, KERNEL = KINDS.index("op"), KINDS.index("kernel")
HOW = "record with record_shapes=True (`calibration.record(FILE, shapes=True)`) and without CUDA graphs"
MOST = 1 << 31  # No dimension of a matrix on a device is as large.
NESTED = 64  # So many operators before a launch are looked at for the one around it.
NO_OPERATOR, NOT_OF_THE_STEPS = -1, -2

Kind = Literal["gated_mlp", "mlp"]


class Product(NamedTuple):
    """(rows, inner) @ (inner, columns)."""

    rows: int
    columns: int
    inner: int


@dataclass
class _Item:
    """The kernels of one product, or one other kernel; `between`: what it does if it is element by element."""

    operator: int
    product: Product | None
    between: Elementwise | None
    ns: int
    sixteen_bits: bool


class _Found(NamedTuple):
    """An MLP in items `first` to `last`."""

    kind: Kind
    rows: int
    hidden: int
    inner: int
    first: int
    last: int


def mlp_chains(trace: Trace, steps: Steps, gap_ns: int) -> tuple[list[TracedMlp], list[str]]:
    """The MLPs that the steps launch kernel by kernel, those with most time first; and what stands in the way of more.

    `gap_ns`: between kernels of a busy stream, added to each kernel's time.
    """
    if not trace.dims:
        return [], [f"tile synchronisation: {_no_shapes(trace)}; to know them, {HOW}"]
    if any(name.startswith("autograd::engine::evaluate_function") for name in trace.names):
        return [], ["tile synchronisation: a backward pass wants what lies between an MLP's products, which tiles skip"]
    times: defaultdict[tuple[Kind, int, int, int], list[tuple[int, int]]] = defaultdict(list)
    left_out = 0
    for items in _streams(trace, steps, gap_ns):
        for found in _mlps(items):
            own = items[found.first : found.last + 1]
            products = [item for item in own if item.product is not None]
            if all(item.sixteen_bits for item in products):
                taken = sum(item.ns for item in own), sum(item.ns for item in products)
                times[found[:4]].append(taken)
            else:
                left_out += 1
    notes = []
    if left_out:
        notes.append(f"tile synchronisation: left out {left_out} MLPs whose kernels do not tell of numbers of 16 bits")
    elif not times:
        notes.append(f"tile synchronisation: no MLP among the products whose shapes are known; {HOW}")
    count = len(steps.starts_ns) - 1
    chains = [
        TracedMlp(
            kind=kind, rows=rows, hidden=hidden, inner=inner, count=len(taken) / count,
            ns=sum(ns for ns, _ in taken) / len(taken), products_ns=sum(ns for _, ns in taken) / len(taken),
        )
        for (kind, rows, hidden, inner), taken in times.items()
    ]  # fmt: skip
    return sorted(chains, key=lambda chain: -chain.ns * chain.count), notes


def _no_shapes(trace: Trace) -> str:
    activity = np.flatnonzero(np.isin(trace.kind, ACTIVITIES))
    names = np.unique(trace.name[activity[_replayed(trace, activity)]])
    if any(is_product(trace.names[name]) for name in names):
        return "matrix products are replayed in a graph, where a trace has no shapes of them"
    return "the trace has no shapes of matrix products"


def _replayed(trace: Trace, activity: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which activities are a graph's: one launch of many."""
    _, number, counts = np.unique(trace.correlation[activity], return_inverse=True, return_counts=True)
    return (trace.graph_node[activity] > 0) | (counts[number] > 1)


def _mlps(items: Sequence[_Item]) -> Iterator[_Found]:
    """The MLPs among a stream's items; none has a part in two."""
    places = [place for place, item in enumerate(items) if item.product is not None]
    at = 0
    while at < len(places) - 1:
        found = _three(items, places[at : at + 3]) or _two(items, places[at : at + 2])
        if found is not None:
            yield found
        at += 1 if found is None else sum(place <= found.last for place in places[at : at + 3])


def _three(items: Sequence[_Item], places: Sequence[int]) -> _Found | None:
    """Gate, up and down apart: one of the two halves is activated, and both are multiplied before the last product."""
    if len(places) < 3:
        return None
    gate, up, down = (items[place].product for place in places)
    early, late = (_between(items[a + 1 : b]) for a, b in pairwise(places))
    if gate is None or gate != up or down != Product(gate.rows, gate.inner, gate.columns):
        return None
    if early is None or late is None or early.activates == late.activates or not late.multiplies:
        return None
    return _Found("gated_mlp", gate.rows, gate.inner, gate.columns, places[0], places[2])


def _two(items: Sequence[_Item], places: Sequence[int]) -> _Found | None:
    """Up, or gate and up in one, then down."""
    up, down = (items[place].product for place in places)
    between = _between(items[places[0] + 1 : places[1]])
    if up is None or down is None or between is None or not between.activates:
        return None
    if (up.rows, up.inner) != (down.rows, down.columns) or up.columns not in (down.inner, 2 * down.inner):
        return None
    kind: Kind = "mlp" if up.columns == down.inner else "gated_mlp"
    return _Found(kind, up.rows, up.inner, down.inner, places[0], places[1])


def _between(items: Sequence[_Item]) -> Elementwise | None:
    """What kernels do together; None: not all of them go element by element."""
    parts = [item.between for item in items if item.between is not None]
    if len(parts) < len(items):
        return None
    return Elementwise(any(part.activates for part in parts), any(part.multiplies for part in parts))


def _streams(trace: Trace, steps: Steps, gap_ns: int) -> Iterator[list[_Item]]:
    """What the steps put on each stream, in order, the kernels of a product together."""
    activity = np.flatnonzero(np.isin(trace.kind, ACTIVITIES) & (trace.correlation >= 0))
    operators = _operators(trace, activity, steps)
    activity, operators = activity[operators != NOT_OF_THE_STEPS], operators[operators != NOT_OF_THE_STEPS]
    products: dict[int, Product | None] = {NO_OPERATOR: None}
    known: dict[tuple[int, str], Elementwise | None] = {}
    sixteen_bits = [of_sixteen_bits(name) for name in trace.names]
    for lane in np.unique(trace.lane[activity]):
        items: list[_Item] = []
        reached = 0
        mine = trace.lane[activity] == lane
        for i, operator in zip(activity[mine].tolist(), operators[mine].tolist(), strict=True):
            name, kernel = "" if operator < 0 else trace.names[trace.name[operator]], int(trace.name[i])
            if operator not in products:
                products[operator] = product_of(name, trace.dims.get(int(trace.external[operator])))
            start, end = int(trace.start_ns[i]), int(trace.end_ns[i])
            ns = max(end - max(start, reached), 0) + gap_ns  # Where kernels overlap the time counts once.
            reached = max(reached, end)
            if products[operator] is not None and items and items[-1].operator == operator:
                items[-1].ns += ns
                items[-1].sixteen_bits |= sixteen_bits[kernel]
                continue
            if (kernel, name) not in known:
                known[kernel, name] = elementwise(trace.names[kernel], name) if trace.kind[i] == KERNEL else None
            items.append(_Item(operator, products[operator], known[kernel, name], ns, sixteen_bits[kernel]))
        yield items


def _operators(trace: Trace, activity: NDArray[np.int64], steps: Steps) -> NDArray[np.int64]:
    """The event of each activity's operator, NO_OPERATOR where it has none or is a graph's, or NOT_OF_THE_STEPS."""
    launches = np.flatnonzero((trace.kind == RUNTIME) & (trace.correlation >= 0))
    found = _first(trace.correlation[launches], trace.correlation[activity])
    launch = launches[found] if launches.size else np.zeros_like(activity)
    start = trace.start_ns[launch]
    inside = (found >= 0) & (start >= steps.starts_ns[0]) & (start < steps.starts_ns[-1])
    own = trace.external[activity]
    external = np.where(own >= 0, own, trace.external[launch])
    ops = np.flatnonzero((trace.kind == OP) & (trace.external >= 0))
    by_id = _first(trace.external[ops], external)
    operators = np.where(by_id >= 0, ops[by_id], NO_OPERATOR) if ops.size else by_id
    replayed = _replayed(trace, activity)
    alone = np.flatnonzero(inside & ~replayed & (operators == NO_OPERATOR))
    operators[alone] = _around(trace, launch[alone])
    operators[replayed] = NO_OPERATOR
    operators[~inside] = NOT_OF_THE_STEPS
    return operators


def _first(among: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """The index of the first of `among` that equals each of `wanted`; -1 where none does, or that is negative."""
    if not among.size:
        return np.full(len(wanted), -1, np.int64)
    order = np.argsort(among, kind="stable")
    found = order[np.searchsorted(among[order], wanted).clip(max=len(among) - 1)]
    return np.where((among[found] == wanted) & (wanted >= 0), found, -1)


def _around(trace: Trace, launches: NDArray[np.int64]) -> NDArray[np.int64]:
    """The innermost operator around each launch, of its thread."""
    operators = np.full(len(launches), NO_OPERATOR, np.int64)
    for lane in np.unique(trace.lane[launches]):
        ops = np.flatnonzero((trace.kind == OP) & (trace.lane == lane))
        starts = trace.start_ns[ops]
        for place in np.flatnonzero(trace.lane[launches] == lane).tolist():
            launch = launches[place]
            last = int(np.searchsorted(starts, trace.start_ns[launch], side="right"))
            before = ops[max(last - NESTED, 0) : last][::-1]
            covering = before[trace.end_ns[before] >= trace.end_ns[launch]]
            if covering.size:
                operators[place] = covering[0]
    return operators


def product_of(operator: str, dims: str | None) -> Product | None:
    """The product that an operator is, by the JSON of its inputs' shapes; None: not one of two matrices."""
    shapes = [] if dims is None else json.loads(dims)
    operands = shapes[1:3] if operator == "aten::addmm" else shapes[:2]
    if len(operands) < 2 or min(map(len, operands)) < 2 or operator in ("aten::baddbmm", "aten::_scaled_mm"):
        return None
    first, second = operands
    if operator == "aten::linear":
        second = second[::-1]
    *batch, inner, columns = second
    made = Product(prod(first[:-1]), columns, inner)
    return made if first[-1] == inner and prod(batch) == 1 and all(0 < size < MOST for size in made) else None
