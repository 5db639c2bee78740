"""Runs the compiled engine: lays out its arrays, keeps it in draws, empties its buffers, and reads off the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from batchsim.costs import Draws, ProfileCosts
from batchsim.iteration import state
from batchsim.iteration.state import NAMES, NEVER, STAGES
from batchsim.metrics import Totals
from batchsim.operation import Limits, added_series
from batchsim.operations import HOST_PHASES
from batchsim.records import Lane, Span
from batchsim.router import ROUTERS
from batchsim.served import Int64, Series, Served
from batchsim.streams import LONG_AGO_NS
from batchsim.workload import Requests

LANES: tuple[Lane, ...] = ("host", "copy_in", "compute", "copy_out")
# Steps between two returns of the compiled engine: few at first, for short runs.
FIRST_QUOTA, QUOTA = 512, 8192
# Of the window, and what may reach into it: some thirty steps.
LOG_ROWS = 640


class Arrays(NamedTuple):
    """What the compiled engine works on; see `batchsim.iteration.state`."""

    settings: Any  # one
    replicas: Any
    requests: Any
    flights: Any  # two for each replica
    integers: Any  # flat
    floats: Any  # flat; the draws come last


class Layout:
    """Parts of a flat array, put one after the other."""

    def __init__(self, dtype: type) -> None:
        self._dtype = dtype
        self._parts: list[npt.NDArray[Any]] = []
        self._size = 0

    def add(self, values: npt.ArrayLike) -> int:
        """Append `values`, and return where they begin."""
        part: npt.NDArray[Any] = np.asarray(values, self._dtype).ravel()
        self._parts.append(part)
        self._size += len(part)
        return self._size - len(part)

    def room(self, size: int) -> int:
        """Append room for `size` values, and return where it begins."""
        return self.add(np.zeros(size, self._dtype))

    def array(self) -> npt.NDArray[Any]:
        return np.concatenate(self._parts)


@cache
def load() -> None:
    """Bring in the compiled engine: compiled now if it never was on this machine, which takes some seconds."""
    import numba

    from batchsim.iteration.core import serve

    records = (np.empty(0, dtype) for dtype in (state.SETTINGS, state.REPLICA, state.REQUEST, state.FLIGHT))
    flat = (np.empty(0, np.int64), np.empty(0, np.float64))
    typeof: Any = numba.typeof
    serve.compile(tuple(typeof(each) for each in (*records, *flat, False)))  # type: ignore[attr-defined]


class Compiled:
    """A run of compiled code, in pieces: between two of them its draws are renewed, and its buffers emptied.

    `costs` are those of each replica; `draws`, in the order of NAMES, theirs.
    """

    def __init__(self, arrays: Any, costs: Sequence[Any], draws: Sequence[Sequence[Draws]]) -> None:
        self.arrays, self._costs, self._draws = arrays, costs, draws
        self._begins = self.arrays.replicas["positions"].tolist()
        self._stops = self.arrays.replicas["positions"].tolist()
        self._fresh = True
        self._steps: list[list[Int64]] = [[] for _ in costs]
        self._refill()

    def run(self, progress: Callable[[int, int], None] | None = None) -> bool:
        """Serve all requests; `progress` is told of requests that have left, and of the time, nanoseconds.

        Returns False if it was interrupted (KeyboardInterrupt); what is done by then can be read as usual.
        """
        try:
            while self._serve(closes=False) != state.DONE:
                self._drain()
                self._refill()
                if progress is not None:
                    progress(self.left, int(self.arrays.replicas["now_ns"].max()))
            whole = True
        except KeyboardInterrupt:
            whole = False
        self._serve(closes=True)
        self._drain()
        return whole

    def _serve(self, *, closes: bool) -> int:
        """Go on until the draws or the room are used up, and say why that stopped; or close the accounts."""
        raise NotImplementedError

    @property
    def left(self) -> int:
        """Requests that are done with."""
        return self._sum("finished")

    @property
    def total_ns(self) -> int:
        """The time that the run has taken."""
        return int(self.arrays.replicas["now_ns"].max())

    @property
    def work(self) -> dict[str, int]:
        """How much was simulated: steps, decisions, and events handled one by one."""
        return {
            "iterations": self._sum("updates"), "decisions": self._sum("decisions"), "events": self._sum("events")
        }  # fmt: skip

    def totals(self) -> Totals:
        """The sums that metrics are made from."""
        replicas = self.arrays.replicas
        stage_ns, steps = (replicas[name].sum(axis=0).tolist() for name in ("stage_ns", "stage_steps"))
        idle = dict(zip(STAGES, replicas["idle_ns"].sum(axis=0).tolist(), strict=True))
        no_requests = STAGES.index("no_requests")
        # Replicas that are through before the last one have nothing to do.
        ended = len(replicas) * self.total_ns - self._sum("now_ns")
        idle["no_requests"] += ended
        asynchronous = bool(self.arrays.settings[0]["asynchronous"])
        host = [name for name in HOST_PHASES if name != "stream_wait" or asynchronous]
        device = [
            name for name in ("decode", "prefill", "device_copy_in", "device_copy_out") if steps[STAGES.index(name)]
        ]
        return Totals(
            total_ns=self.total_ns,
            stage_ns={name: stage_ns[STAGES.index(name)] for name in (*host, *device)},
            stage_steps={name: steps[STAGES.index(name)] for name in device},
            idle_ns=idle,
            busy_ns=self._sum("busy_ns"),
            gap_ns=self._sum("gap_ns"),
            no_requests_ns=stage_ns[no_requests] + ended,
            steps_ns=_joined(self._steps),
            replicas=len(replicas),
        )

    def spans(self) -> list[Span]:
        """The spans of the window, of the first replica, by start."""
        logged = int(self.arrays.replicas[0]["logged"])
        rows = self._table(0, "log_at", state.LOG_COLUMNS * logged).reshape(-1, state.LOG_COLUMNS).tolist()
        rows.sort(key=lambda row: (row[3], row[4]))
        return [Span(row[0], LANES[row[1]], STAGES[row[2]].removeprefix("device_"), *row[3:]) for row in rows]

    def note_extrapolations(self) -> None:
        """Tell the costs of what was asked for outside the measured range."""
        costs = self._costs[0]
        curves = costs.device.decode
        size = 2 * len(curves) + 4
        seen = np.array([self._table(k, "extrapolated_at", size).reshape(-1, 2) for k in range(len(self._costs))])
        low, high = seen[..., 0].min(axis=0), seen[..., 1].max(axis=0)
        tell: list[Callable[[int], None]] = [lambda n, curve=curve: costs.note_context(curve, n) for curve in curves]  # type: ignore[misc]
        for note, least, most in zip([*tell, costs.note_rows, costs.note_prefill], low, high, strict=True):
            if most >= 0:
                note(int(least))
                note(int(most))

    def _sum(self, name: str) -> int:
        return int(self.arrays.replicas[name].sum())

    def _table(self, k: int, name: str, size: int) -> Int64:
        at = int(self.arrays.replicas[k][name])
        return np.asarray(self.arrays.integers[at : at + size])

    def _refill(self) -> None:
        """Give every replica draws for as many steps as its buffers hold."""
        floats, quota = self.arrays.floats, FIRST_QUOTA if self._fresh else QUOTA
        self._fresh = False
        for s, streams, stops in zip(self.arrays.replicas, self._draws, self._stops, strict=True):
            for name, (stream, stop) in enumerate(zip(streams, stops, strict=True)):
                begin, at = self._begins[s["number"]][name], s["positions"][name]
                kept, wanted = stop - at, draws_for(quota, name)
                if kept < wanted:
                    floats[begin : begin + kept] = floats[at:stop].copy()
                    floats[begin + kept : begin + wanted] = stream.take(wanted - kept)
                    s["positions"][name], stops[name] = begin, begin + wanted
        self.arrays.replicas["quota"] = quota

    def _drain(self) -> None:
        """Empty the buffers."""
        for k, s in enumerate(self.arrays.replicas):
            self._steps[k].append(self._table(k, "steps_at", s["steps"]).copy())
        self.arrays.replicas["steps"] = 0


class Iterations(Compiled):
    """One schedule's run at the iteration level. `costs` are those of each replica.

    `window` asks for the spans of a few steps from the first one on that is no earlier than (step, nanoseconds).
    """

    def __init__(
        self,
        requests: Requests,
        costs: Sequence[ProfileCosts],
        limits: Limits,
        *,
        asynchronous: bool,
        warm_up_ns: int = 0,
        window: tuple[int, int] | None = None,
        token_times: bool = False,
    ) -> None:
        self._limits = limits
        self._weights: list[list[Int64]] = [[] for _ in costs]
        self._extras: list[Int64] = []
        self._tokens: list[Int64] = []
        arrays = _arrays(requests, costs[0], limits, asynchronous, warm_up_ns, window, token_times)
        super().__init__(arrays, costs, [[each.draws(name) for name in NAMES] for each in costs])

    def _serve(self, *, closes: bool) -> int:
        from batchsim.iteration.core import serve

        return int(serve(*self.arrays, closes))

    @property
    def counts(self) -> dict[str, int]:
        """Requests and tokens, as `Totals.result` takes them."""
        return {
            "requests": self._sum("finished"),
            "output_tokens": self._sum("output_tokens"),
            "wasted_tokens": self._sum("wasted_tokens"),
            "preemptions": self._sum("preempted"),
        }

    @property
    def accepted(self) -> int:
        """Requests that have arrived."""
        return self._sum("accepted")

    def served(self) -> Served:
        """The table of all requests that have arrived."""
        rows = self.arrays.requests
        rows = rows[rows["state"] != state.COMING]
        decoding = rows["state"] == state.DECODING
        generated = rows["generated"].copy()
        # Of those that still run, what has been read: nothing of steps that were not.
        read = self.arrays.replicas["updates"][rows["replica"]] - rows["decodes_from"] + 1
        generated[decoding] += np.maximum(read[decoding], 0)
        steps, weights = _joined(self._steps), _joined(self._weights)
        extras = np.concatenate(self._extras or [_none()])
        kept = weights > 0

        def column(name: str) -> Int64:
            return np.ascontiguousarray(rows[name])

        blocks = self._limits.num_kv_blocks
        return Served(
            arrival_ns=column("arrival_ns"),
            started_ns=column("started_ns"),
            first_token_ns=column("first_token_ns"),
            finished_ns=column("finished_ns"),
            prompt_tokens=column("prompt_tokens"),
            output_tokens=column("output_tokens"),
            generated=generated,
            cached_tokens=column("cached_tokens"),
            preemptions=column("preemptions"),
            priority=column("priority"),
            replica=column("replica"),
            itl_ns=np.concatenate([steps[kept], extras]),
            itl_count=np.concatenate([weights[kept], np.ones(len(extras), np.int64)]),
            batch_sizes=np.sum(
                [self._table(k, "batch_sizes_at", self._limits.max_num_seqs + 1) for k in range(len(self._costs))],
                axis=0,
            ),
            series=self._series(),
            kv_blocks=0 if blocks is None else blocks * len(self._costs),
            warm_up_ns=int(self.arrays.settings[0]["warm_up_ns"]),
            total_ns=self.total_ns,
        )

    def token_times(self) -> Int64:
        """(tokens, 2): the request and the time of every token, in the order in which they were read."""
        return np.concatenate(self._tokens or [np.empty((0, 2), np.int64)])

    def _series(self) -> Series:
        return added_series([Series(*s["series"][: s["moments"]].T.copy()) for s in self.arrays.replicas])

    def _drain(self) -> None:
        replicas = self.arrays.replicas
        for k, s in enumerate(replicas):
            self._weights[k].append(self._table(k, "weights_at", s["steps"]).copy())
            self._extras.append(self._table(k, "extras_at", s["extras"]).copy())
            self._tokens.append(self._table(k, "tokens_at", 2 * s["tokens_kept"]).reshape(-1, 2).copy())
        for name in ("extras", "tokens_kept"):
            replicas[name] = 0
        super()._drain()


def draws_for(steps: int, name: int) -> int:
    """How many draws of a name a replica needs at most for so many steps, and what follows the last of them."""
    return steps * state.DRAWS_A_STEP.get(NAMES[name], 1) + 8


def _none() -> Int64:
    return np.empty(0, np.int64)


def _joined(replicas: Sequence[Sequence[Int64]]) -> Int64:
    """What was drained of each replica, one after the other."""
    return np.concatenate([part for parts in replicas for part in parts] or [_none()])


def _arrays(
    asked: Requests, costs: ProfileCosts, limits: Limits, asynchronous: bool, warm_up_ns: int,
    window: tuple[int, int] | None, token_times: bool,
) -> Arrays:  # fmt: skip
    """Everything as it is before the first decision, but for the draws."""
    caching = limits.prefix_caching and asked.hash_tokens > 0 and limits.num_kv_blocks is not None
    integers, floats = Layout(np.int64), Layout(np.float64)
    settings = np.zeros(1, state.SETTINGS)
    seqs, count = limits.max_num_seqs, len(asked)
    extras_size, tokens_size, log_rows = (
        4096 + 2 * seqs,
        65_536 + 8 * seqs if token_times else 0,
        LOG_ROWS if window else 0,
    )
    values = cost_settings(costs, seqs, integers, floats) | {
        "asynchronous": asynchronous,
        "max_num_seqs": seqs,
        "max_num_batched_tokens": limits.max_num_batched_tokens,
        "block_size": limits.block_size,
        "num_kv_blocks": NEVER >> 2 if limits.num_kv_blocks is None else limits.num_kv_blocks,
        "chunked_prefill": limits.chunked_prefill,
        "reserve": limits.reserve,
        "prefix_caching": caching,
        "hash_tokens": asked.hash_tokens,
        "hash_ids_at": integers.add(asked.hash_ids if caching else ()),
        "max_concurrency": NEVER if asked.max_concurrency is None else asked.max_concurrency,
        "closed": asked.closed,
        "warm_up_ns": warm_up_ns,
        "router": ROUTERS.index(limits.router),
        "next_routed": 0 if limits.routed else count,
        "keep_tokens": token_times,
        "tokens_size": tokens_size,
        "extras_size": extras_size,
        "log_rows": log_rows,
        "log_steps": 0 if window is None else max(window[0], 1),
        "log_from_ns": 0 if window is None else window[1],
    }
    for name, value in values.items():
        settings[0][name] = value

    replicas = np.zeros(limits.replicas, state.REPLICA)
    blocks = limits.num_kv_blocks if caching and limits.num_kv_blocks else 0
    slots = 1 << (2 * blocks).bit_length()
    for k, s in enumerate(replicas):
        tables: dict[str, int] = {
            "queue_at": integers.room(count),
            "running_at": integers.room(seqs),
            "needs_at": integers.room(limits.block_size),
            "finals_at": integers.room(2 * seqs),
            "late_at": integers.room(seqs),
            "slots_at": integers.add(np.full(slots, -1)),
            "batch_sizes_at": integers.room(seqs + 1),
            "extrapolated_at": integers.add(np.tile([NEVER, -1], len(costs.device.decode) + 2)),
            "steps_at": integers.room(QUOTA + 8),
            "weights_at": integers.room(QUOTA + 8),
            "extras_at": integers.room(extras_size),
            "tokens_at": integers.room(2 * tokens_size),
            "log_at": integers.room(state.LOG_COLUMNS * log_rows),
            "number": k, "next": k, "stop": 0 if limits.routed else count, "stride": limits.replicas,
            "more": limits.routed,
            "next_finish": int(NEVER), "moment_stride": 1, "slots_mask": slots - 1,
            **dict.fromkeys(("unread", "partial", "oldest", "newest", "log_step"), -1),
            # As in batchsim.streams: the first command of a stream pays no gap.
            **dict.fromkeys(("end_ns", "in_end_ns", "out_end_ns"), LONG_AGO_NS),
        }  # fmt: skip
        # Free entries are a list.
        first = integers.room(0)
        entries = np.zeros((blocks, 4), np.int64)
        entries[:, 3] = first + 4 * np.arange(1, blocks + 1)
        tables["spare"] = integers.add(entries)
        for name, value in tables.items():
            s[name] = value
        s["positions"] = [floats.room(draws_for(QUOTA, name)) for name in range(len(NAMES))]

    requests = np.zeros(count, state.REQUEST)
    for name in ("arrival_ns", "prompt_tokens", "output_tokens", "priority"):
        requests[name] = getattr(asked, name)
    requests["rank"] = np.arange(count) + (asked.priority << 40 if limits.by_priority else 0)
    if caching:
        requests["hash_start"], requests["hashes"] = asked.hash_starts[:-1], np.diff(asked.hash_starts)
    for name in ("started_ns", "first_token_ns", "finished_ns"):
        requests[name] = -1
    flights = np.zeros(2 * limits.replicas, state.FLIGHT)
    return Arrays(settings, replicas, requests, flights, integers.array(), floats.array())


def cost_settings(costs: ProfileCosts, seqs: int, integers: Layout, floats: Layout) -> dict[str, Any]:
    """The costs as settings; their tables go to the flat arrays."""
    device, loop, latencies = costs.device, costs.loop, costs.latencies
    curves, prefill = device.decode, device.prefill
    sizes = np.array([curve.size for curve in curves])
    phases = np.zeros((len(NAMES), 5))
    for row, name in zip(phases, NAMES[:-2], strict=False):
        fit = costs.host_fit(name)
        row[:] = fit.step_ns, fit.seq_ns, fit.prefill_token_ns, fit.admitted_ns, fit.token_ns
    return {
        "phases": phases,
        "scale": costs.scale,
        "overlaps": costs.overlaps,
        "graphs": costs.graphs,
        "launch_ns": latencies.launch_ns,
        "copy_ns": latencies.copy_ns,
        "event_ns": latencies.event_ns,
        "event_gap_ns": latencies.gap_ns,
        "wake_up_ns": latencies.wake_up_ns,
        "copy_in_device_ns": loop.copy_in_device_ns,
        "copy_out_device_ns": loop.copy_out_device_ns,
        "copy_in_device_seq_ns": loop.copy_in_device_seq_ns,
        "copy_in_device_token_ns": loop.copy_in_device_token_ns,
        "copy_out_device_seq_ns": loop.copy_out_device_seq_ns,
        "measured_seqs": sizes[-1],
        "curves": len(curves),
        "curve_of_at": integers.add(np.minimum(np.searchsorted(sizes, np.arange(seqs + 1)), len(sizes) - 1)),
        "curve_sizes_at": integers.add(sizes),
        "curve_starts_at": integers.add(np.cumsum([0, *(len(curve.kv_tokens) for curve in curves)])),
        "curve_kv_at": integers.add([tokens for curve in curves for tokens in curve.kv_tokens]),
        "curve_ns_at": floats.add([ns for curve in curves for ns in curve.ns]),
        "beyond_ns_at": floats.add([device.beyond_ns(rows) for rows in range(seqs + 1)]),
        "prefill_points": len(prefill.num_tokens),
        "prefill_tokens_at": integers.add(prefill.num_tokens),
        "prefill_ns_at": floats.add(prefill.ns),
        **{name: getattr(costs.kernels, name) for name in ("first", "layers", "per_layer", "last", "split_rows")},
        **{name: getattr(device, name) for name in ("eager_factor", "outer_share")},
        **{name: getattr(prefill, name) for name in ("pair_ns", "depth_ns", "mixed_ns", "row_ns", "kv_ns", "tile")},
    }
