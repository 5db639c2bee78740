"""Runs compiled dynamic batching: lays out its arrays, keeps it in draws and in room, and reads off the results."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from batchsim import answered
from batchsim.answered import BATCH, Answered
from batchsim.costs import Draws, ProfileCosts
from batchsim.dynamic_scenario import DynamicScenario, nanoseconds
from batchsim.iteration import dynamic_state, state
from batchsim.iteration.engine import (
    LOG_ROWS,
    QUOTA,
    Compiled,
    Layout,
    cost_settings,
    draws_for,
)  # fmt: skip
from batchsim.iteration.state import NAMES, NEVER
from batchsim.metrics import Totals
from batchsim.records import Span
from batchsim.service import TableCosts
from batchsim.streams import LONG_AGO_NS
from batchsim.workload import Requests

FIRST_ROWS = 65_536


class Arrays(NamedTuple):
    """What compiled dynamic batching works on; see `batchsim.iteration.state` and `dynamic_state`."""

    settings: Any  # one
    queue: Any  # one
    replicas: Any
    requests: Any
    rows: Any
    flights: Any  # two for each replica
    integers: Any  # flat
    floats: Any  # flat; the draws come last


@cache
def load() -> None:
    """Bring in compiled dynamic batching: compiled now if it never was on this machine, which takes some seconds."""
    import numba

    from batchsim.iteration.dynamic_core import serve

    dtypes = (state.SETTINGS, dynamic_state.QUEUE, state.REPLICA, dynamic_state.REQUEST, BATCH, state.FLIGHT)
    flat = (np.empty(0, np.int64), np.empty(0, np.float64))
    typeof: Any = numba.typeof
    serve.compile(tuple(typeof(each) for each in (*(np.empty(0, dtype) for dtype in dtypes), *flat, False)))  # type: ignore[attr-defined]


class DynamicIterations(Compiled):
    """One schedule's run at the iteration level; `costs` are those of each instance: several of a table, in sync alone.

    `window` asks for the spans of a few steps from the first one on that is no earlier than (step, nanoseconds).
    """

    def __init__(
        self,
        scenario: DynamicScenario,
        requests: Requests,
        costs: Sequence[ProfileCosts] | Sequence[TableCosts],
        schedule: str,
        *,
        window: tuple[int, int] | None = None,
    ) -> None:
        self._table_costs = costs[0] if isinstance(costs[0], TableCosts) else None
        self._warm_up_ns = round(scenario.warm_up_s * 1e9)
        arrays = _arrays(scenario, requests, costs, schedule == "async", window)
        # With a table the machine draws nothing, and finds ones where it looks for draws.
        draws = [[each.draws(name) for name in NAMES] for each in costs if isinstance(each, ProfileCosts)]
        super().__init__(arrays, costs, draws or [_ones()] * len(costs))

    def _serve(self, *, closes: bool) -> int:
        from batchsim.iteration.dynamic_core import serve

        return int(serve(*self.arrays, closes))

    @property
    def left(self) -> int:
        queue = self.arrays.queue[0]
        return int(queue["finished"] + queue["lost"])

    def totals(self) -> Totals:
        found = super().totals()
        stages = {"stage_ns": dict(found.stage_ns), "stage_steps": dict(found.stage_steps)}
        for each in stages.values():
            each["forward"] = each.pop("decode", 0)
        return Totals(**{name: getattr(found, name) for name in Totals.__slots__} | stages)

    def answered(self) -> Answered:
        """The tables of the requests that have arrived, and of their batches."""
        queue = self.arrays.queue[0]
        requests, rows = self.arrays.requests[: queue["next"]], self.arrays.rows[: queue["batches"]]
        in_flight = rows["finished_ns"] < 0
        if in_flight.any():  # of an interrupted run
            served = requests["batch"] >= 0
            requests["outcome"][served & in_flight[requests["batch"]]] = answered.WAITING
        shared = self._table_costs is None
        return Answered(requests, rows, self._warm_up_ns, self.total_ns, instances_share=shared)

    def spans(self) -> list[Span]:
        return [span._replace(stage="forward") if span.lane == "compute" else span for span in super().spans()]

    def note_extrapolations(self) -> None:
        if self._table_costs is None:
            super().note_extrapolations()
        else:
            self._table_costs.note_sizes(
                np.unique(self.arrays.rows["size"][: self.arrays.queue[0]["batches"]]).tolist()
            )

    def _refill(self) -> None:
        super()._refill()
        queue, rows = self.arrays.queue[0], self.arrays.rows
        if queue["batches"] == len(rows):
            more = np.zeros(min(2 * len(rows), len(self.arrays.requests) + 1), BATCH)
            more[: len(rows)] = rows
            self.arrays = self.arrays._replace(rows=more)
        if self._table_costs is not None and queue["draws"] == queue["draws_end"]:
            begin = queue["draws_at"]
            self.arrays.integers[begin : begin + QUOTA] = self._table_costs.take(QUOTA)
            queue["draws"], queue["draws_end"] = 0, QUOTA


class _Ones(Draws):
    """Draws that are all one."""

    def __init__(self) -> None:
        super().__init__([1.0], seed=0, replication=0, name="")


def _ones() -> list[Draws]:
    return [_Ones()] * len(NAMES)


def _arrays(
    scenario: DynamicScenario, asked: Requests, costs: Sequence[ProfileCosts] | Sequence[TableCosts],
    asynchronous: bool, window: tuple[int, int] | None,
) -> Arrays:  # fmt: skip
    """Everything as it is before the first decision, but for the draws."""
    integers, floats = Layout(np.int64), Layout(np.float64)
    log_rows = LOG_ROWS if window else 0
    settings, queue = np.zeros(1, state.SETTINGS), np.zeros(1, dynamic_state.QUEUE)
    values: dict[str, Any] = {
        "asynchronous": asynchronous, "log_rows": log_rows, "log_steps": 0 if window is None else max(window[0], 1),
        "log_from_ns": 0 if window is None else window[1],
    }  # fmt: skip
    first = costs[0]
    if isinstance(first, TableCosts):
        # One launch that takes no time.
        values |= {"table": True, "overlaps": True, "graphs": True}
    else:
        values |= cost_settings(first, scenario.max_batch_size, integers, floats)
    for name, value in values.items():
        settings[0][name] = value

    priorities, kinds = _classes(asked)
    preferred = sorted(scenario.preferred_batch_sizes) or [scenario.max_batch_size]
    bounds: dict[str, Any] = {
        "max_batch_size": scenario.max_batch_size,
        "max_queue_delay_ns": nanoseconds(scenario.max_queue_delay_us),
        "queue_timeout_ns": nanoseconds(scenario.queue_timeout_us),
        "drops": scenario.late == "drop",
        "max_queue_size": scenario.max_queue_size,
        "max_priority_wait_ns": nanoseconds(scenario.max_priority_wait_us),
        "length_bucket": scenario.length_bucket,
        "max_concurrency": asked.max_concurrency,
        "closed": asked.closed,
        "preferred_at": integers.add(preferred),
        "preferred": len(preferred),
        "classes": priorities,
        "heads_at": integers.add(np.full(priorities, -1)),
        "tails_at": integers.add(np.full(priorities, -1)),
        "draws_end": NEVER,
    }
    if isinstance(first, TableCosts):
        bounds |= {
            "times_at": integers.add(first.times_ns), "bins": first.times_ns.shape[1],
            "draws_at": integers.room(QUOTA), "draws_end": 0,
        }  # fmt: skip
    for name, value in bounds.items():
        queue[0][name] = NEVER if value is None else value

    replicas = np.zeros(len(costs), state.REPLICA)
    curves = 0 if isinstance(first, TableCosts) else len(first.device.decode) + 2
    for k, s in enumerate(replicas):
        tables: dict[str, Any] = {
            "number": k, "at": state.AT_IDLE, "turn": k,
            "extrapolated_at": integers.add(np.tile([NEVER, -1], curves)),
            "steps_at": integers.room(QUOTA + 8),
            "log_at": integers.room(state.LOG_COLUMNS * log_rows),
            **dict.fromkeys(("unread", "log_step"), -1),
            # As in batchsim.streams: the first command of a stream pays no gap.
            **dict.fromkeys(("end_ns", "in_end_ns", "out_end_ns"), LONG_AGO_NS),
            "positions": [floats.room(draws_for(QUOTA, name)) for name in range(len(NAMES))],
        }  # fmt: skip
        for name, value in tables.items():
            s[name] = value
    queue[0]["turns"] = len(costs)

    count = len(asked)
    requests = np.zeros(count, dynamic_state.REQUEST)
    requests["arrival_ns"], requests["tokens"] = asked.arrival_ns, asked.prompt_tokens
    requests["priority"], requests["kind"] = asked.priority, kinds
    for name in ("left_ns", "batch"):
        requests[name] = -1
    rows = np.zeros(min(count + 1, FIRST_ROWS), BATCH)  # at last one more than there can be
    flights = np.zeros(2 * len(costs), state.FLIGHT)
    return Arrays(settings, queue, replicas, requests, rows, flights, integers.array(), floats.array())


def _classes(asked: Requests) -> tuple[int, Any]:
    """How many priorities there are, and the place of each request's among them, the most urgent first."""
    if asked.priority.strides == (0,):
        return 1, 0
    found, kinds = np.unique(asked.priority, return_inverse=True)
    return len(found), kinds
