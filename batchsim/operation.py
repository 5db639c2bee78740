"""The operation level: every host call, copy, launch and kernel of a run, by SimPy. The reference for all figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import simpy

from batchsim.batching.continuous import ContinuousBatcher, Request, block_hashes
from batchsim.costs import ProfileCosts
from batchsim.errors import RunError
from batchsim.machine import SimulatedMachine
from batchsim.metrics import Metrics, Totals
from batchsim.records import Observer, Span
from batchsim.request_log import RequestLog
from batchsim.router import choose
from batchsim.schedules import SCHEDULES
from batchsim.served import MAX_MOMENTS, Int64, Series, Served
from batchsim.streams import Environment, Waiting
from batchsim.workload import Requests


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds the batches of each replica, as `ContinuousBatcher` takes it, and how requests are handed out."""

    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_kv_blocks: int | None
    chunked_prefill: bool = True
    reserve: bool = False
    by_priority: bool = False
    prefix_caching: bool = False
    replicas: int = 1
    router: str = "round_robin"

    @property
    def routed(self) -> bool:
        """Whether a router looks at the replicas; taking turns is known beforehand."""
        return self.replicas > 1 and self.router != "round_robin"

    def batcher(self, requests: Iterator[Request], asked: Requests) -> ContinuousBatcher:
        """The batcher of one replica."""
        names = [field.name for field in fields(self) if field.name not in ("replicas", "router")]
        return ContinuousBatcher(
            requests,
            max_concurrency=asked.max_concurrency,
            closed=asked.closed,
            **{name: getattr(self, name) for name in names},
        )


def stream(asked: Requests, limits: Limits, *, first: int = 0, stride: int = 1) -> Iterator[Request]:
    """Every `stride`-th request from the `first` on, made as they are asked for."""
    size = limits.block_size
    for i in range(first, len(asked), stride):
        prompt = int(asked.prompt_tokens[i])
        hashes: Sequence[int] = ()
        if limits.prefix_caching and asked.hash_tokens:
            ids = asked.hash_ids[asked.hash_starts[i] : asked.hash_starts[i + 1]].tolist()
            hashes = block_hashes(ids, asked.hash_tokens, prompt, size)
        output, arrival, priority = int(asked.output_tokens[i]), int(asked.arrival_ns[i]), int(asked.priority[i])
        yield Request(i, prompt, output, arrival, priority=priority, hashes=hashes)


@dataclass(frozen=True, slots=True)
class Operated:
    """What a run came to."""

    served: Served
    totals: Totals
    counts: dict[str, int]
    iterations: int
    events: int
    token_times: dict[int, list[int]]


def operate(
    asked: Requests,
    costs: Sequence[ProfileCosts],
    limits: Limits,
    schedule: str,
    *,
    observe: Observer | None = None,
    host_threads: int = 1,
    launch_queue_depth: int = 1024,
    warm_up_ns: int = 0,
    token_times: bool = False,
    tell: Callable[[int, int, int], None] | None = None,
) -> Operated:
    """Serve all requests on machines of the given costs, one for each replica; `observe` is told what the first does.

    `tell` is told now and then how many requests have finished, of how many, and the time, nanoseconds.
    """
    env = Environment()
    every = [Metrics() for _ in costs]
    logs = [RequestLog(warm_up_ns=warm_up_ns, token_times=token_times) for _ in costs]
    machines: list[SimulatedMachine] = []
    batchers: list[ContinuousBatcher] = []
    for k, each in enumerate(costs):
        requests = iter(()) if limits.routed else stream(asked, limits, first=k, stride=len(costs))
        observers: list[Observer] = [every[k], *([observe] if k == 0 and observe is not None else [])]
        if tell is not None:
            observers.append(lambda span: _tell(span, tell, machines, len(asked)))
        batchers.append(limits.batcher(requests, asked))
        machines.append(
            SimulatedMachine(
                batchers[k], each, tell_all(observers), host_threads=host_threads,
                launch_queue_depth=launch_queue_depth, log=logs[k], env=env,
            )
        )  # fmt: skip
        machines[k].expects_more = limits.routed
    programs = [machine.start(SCHEDULES[schedule]()) for machine in machines]
    owners: list[int] = [i % len(costs) for i in range(len(asked))]
    if limits.routed:
        simpy.Process(env, _route(env, asked, limits, machines, batchers, owners))
    ends_ns = [end_ns(env, program) for program in programs]
    total_ns = max(ends_ns)
    if unserved := sum(batcher.unserved for batcher in batchers):
        raise RunError(f"{schedule}: the run ended with {unserved} requests not served to their end")
    served = [log.served(batcher, total_ns) for log, batcher in zip(logs, batchers, strict=True)]
    totals = added_totals([each.totals(end) for each, end in zip(every, ends_ns, strict=True)], total_ns)
    return Operated(
        served=_merged(served, np.array(owners, np.int64), total_ns),
        totals=totals,
        counts={key: sum(batcher.counts[key] for batcher in batchers) for key in batchers[0].counts},
        iterations=len(totals.steps_ns),
        events=next(env._eid),
        token_times={key: times for log in logs for key, times in (log.token_times or {}).items()},
    )


def end_ns(env: Environment, program: simpy.Process) -> int:
    """Run until a program's end, and return the time that it took."""
    found = env.run(until=program)
    assert isinstance(found, int)
    return found


def tell_all(observers: Sequence[Observer]) -> Observer:
    """One observer that tells each of `observers`."""

    def observe(span: Span) -> None:
        for observer in observers:
            observer(span)

    return observe


def _tell(span: Span, tell: Callable[[int, int, int], None], machines: Sequence[SimulatedMachine], asked: int) -> None:
    if span.stage == "update" and span.step % 64 == 0:
        tell(sum(machine.batcher.finished for machine in machines), asked, span.end_ns)


def _route(
    env: Environment, asked: Requests, limits: Limits, machines: Sequence[SimulatedMachine],
    batchers: Sequence[ContinuousBatcher], owners: list[int],
) -> Waiting:  # fmt: skip
    """Hand out requests as they arrive: at one moment, before anything that a machine does then."""
    for request in stream(asked, limits):
        if request.arrival_ns > env.now:
            turn = simpy.Event(env)
            turn._ok, turn._value = True, None
            env.schedule(turn, priority=simpy.events.URGENT, delay=request.arrival_ns - env.now)
            yield turn
        k = choose(limits.router, batchers, request)
        owners[request.id] = k
        machines[k].deliver(request)
    for machine in machines:
        machine.close()


def added_totals(totals: Sequence[Totals], total_ns: int) -> Totals:
    """The sums over replicas; one that is through before the last has no requests until then."""

    def add(name: str) -> dict[str, int]:
        keys = dict.fromkeys(key for each in totals for key in getattr(each, name))
        return {key: sum(getattr(each, name).get(key, 0) for each in totals) for key in keys}

    ended_ns = sum(total_ns - each.total_ns for each in totals)
    idle_ns = add("idle_ns")
    if ended_ns:
        idle_ns["no_requests"] = idle_ns.get("no_requests", 0) + ended_ns
    gaps = [each.gap_ns for each in totals if each.gap_ns is not None]
    return Totals(
        total_ns=total_ns,
        stage_ns=add("stage_ns"),
        stage_steps=add("stage_steps"),
        idle_ns=idle_ns,
        busy_ns=sum(each.busy_ns for each in totals),
        gap_ns=sum(gaps) if len(gaps) == len(totals) else None,
        no_requests_ns=sum(each.no_requests_ns for each in totals) + ended_ns,
        steps_ns=np.concatenate([each.steps_ns for each in totals]),
        replicas=len(totals),
    )


def _merged(served: Sequence[Served], owners: Int64, total_ns: int) -> Served:
    """One table of all replicas' requests."""
    if len(served) == 1:
        return served[0]
    order = np.argsort(np.concatenate([np.flatnonzero(owners == k)[: len(s.arrival_ns)] for k, s in enumerate(served)]))
    columns = {
        field.name: np.concatenate([getattr(each, field.name) for each in served])
        for field in fields(Served)
        if isinstance(getattr(served[0], field.name), np.ndarray)
    }
    longest = max(len(each.batch_sizes) for each in served)
    sizes = sum(np.pad(each.batch_sizes, (0, longest - len(each.batch_sizes))) for each in served)
    pooled = {name: columns[name] for name in ("itl_ns", "itl_count")}
    rows = {name: column[order] for name, column in columns.items() if name not in (*pooled, "batch_sizes")}
    rows["replica"] = np.concatenate([np.full(len(s.arrival_ns), k, np.int64) for k, s in enumerate(served)])[order]
    return Served(
        **rows, **pooled, batch_sizes=np.asarray(sizes), series=added_series([each.series for each in served]),
        kv_blocks=sum(each.kv_blocks for each in served), warm_up_ns=served[0].warm_up_ns, total_ns=total_ns,
    )  # fmt: skip


def added_series(parts: Sequence[Series]) -> Series:
    """The sum of several replicas' series, at some of all their moments."""
    if len(parts) == 1:
        return parts[0]
    times = np.unique(np.concatenate([part.time_ns for part in parts]))
    times = times[:: -(-len(times) // MAX_MOMENTS) or 1]
    added = np.zeros((3, len(times)), np.int64)
    for part in parts:
        if len(part.time_ns):
            at = np.searchsorted(part.time_ns, times, side="right") - 1
            added += np.where(at >= 0, np.array([part.running, part.waiting, part.kv_blocks])[:, at], 0)
    return Series(times, *added)
