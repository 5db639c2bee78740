"""The operation level of dynamic batching: every host call, copy and forward of all instances, by SimPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from batchsim.answered import Answered, AnswerLog, answered
from batchsim.batching.dynamic import DynamicBatcher
from batchsim.errors import RunError
from batchsim.machine import Costs, SimulatedMachine
from batchsim.metrics import Metrics, Totals
from batchsim.operation import added_totals, end_ns, tell_all
from batchsim.records import Observer, Span
from batchsim.schedules import SCHEDULES
from batchsim.streams import Device, Engine, Environment, HostThreads


@dataclass(frozen=True, slots=True)
class Operated:
    """What a run came to. `device` are the sums of the one device that several instances share, if they do."""

    answered: Answered
    totals: Totals
    device: Totals | None
    iterations: int
    events: int


def operate(
    batcher: DynamicBatcher,
    costs: Sequence[Costs],
    schedule: str,
    *,
    shared: bool,
    host_threads: int = 1,
    launch_queue_depth: int = 1024,
    warm_up_ns: int = 0,
    observe: Observer | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> Operated:
    """Serve all requests of `batcher` on instances of the given costs.

    `shared`: on one device and the host's threads in common; else each is a machine of its own. `observe` is told what
    the first does, `tell` now and then how many requests have left the server, and the time, nanoseconds.
    """
    env = Environment()
    every, logs = [Metrics() for _ in costs], [AnswerLog(k) for k in range(len(costs))]
    together = Metrics() if shared and len(costs) > 1 else None
    device = None if together is None else Device(compute=Engine())
    threads = HostThreads(env, host_threads) if shared else None
    programs = []
    for k, each in enumerate(costs):
        observers: list[Observer] = [every[k], logs[k]]
        if together is not None:
            observers.append(together)
        if k == 0 and observe is not None:
            observers.append(observe)
        if tell is not None:
            observers.append(lambda span: _tell(span, tell, batcher))
        machine = SimulatedMachine(
            batcher, each, tell_all(observers), launch_queue_depth=launch_queue_depth, log=logs[k], env=env,
            device=device, threads=threads,
        )  # fmt: skip
        programs.append(machine.start(SCHEDULES[schedule]()))
    ends_ns = [end_ns(env, program) for program in programs]
    total_ns = max(ends_ns)
    if unserved := batcher.unserved:
        raise RunError(f"{schedule}: the run ended with {unserved} requests not served to their end")
    totals = added_totals([each.totals(end) for each, end in zip(every, ends_ns, strict=True)], total_ns)
    return Operated(
        answered=answered(logs, batcher, warm_up_ns=warm_up_ns, total_ns=total_ns, instances_share=shared),
        totals=totals,
        device=None if together is None else together.totals(total_ns),
        iterations=len(totals.steps_ns),
        events=next(env._eid),
    )


def _tell(span: Span, tell: Callable[[int, int], None], batcher: DynamicBatcher) -> None:
    if span.stage == "update" and span.step % 64 == 0:
        tell(batcher.finished + len(batcher.refused) + len(batcher.dropped), span.end_ns)
