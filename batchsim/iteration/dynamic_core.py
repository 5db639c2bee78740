"""Compiled: the loops of the schedules sync and async under dynamic batching, by one instance or several.

Several instances serve one queue as the processes of the operation level do: the earliest goes on; of those that wait
for requests, or for their batches, at the same moment, the former first, and then the one that began to wait first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from batchsim.iteration import dynamic_batcher as batcher
from batchsim.iteration.compiled import Int, entry, njit, sources_digest
from batchsim.iteration.machine import (
    NO_STEP,
    attribute,
    await_request,
    bare_phase,
    enqueue_async,
    enqueue_sync,
    phase,
    synchronize,
)  # fmt: skip
from batchsim.iteration.state import (
    AT_END,
    AT_IDLE,
    AT_SCHEDULE,
    AT_UPDATE,
    DONE,
    NEVER,
    QUOTA,
    SCHEDULE,
    UPDATE,
)  # fmt: skip


@njit
def _flight(s: Any, flights: Any, step: Int) -> Any:
    return flights[2 * s.number + (step & 1)]


@njit
def _decide(q: Any, s: Any, c: Any, rq: Any, rows: Any, flights: Any, m: Any, x: Any) -> None:
    """From a decision to the host's return from waiting for the batch whose answers it reads next, or to its wait for
    requests."""
    idle = s.at == AT_IDLE
    if idle:
        s.now_ns = s.wake_ns
        s.events += 1
    f = _flight(s, flights, s.step)
    scheduled = batcher.schedule(q, s, c, rq, rows, m, f)
    if not scheduled and s.unread < 0:
        due = batcher.next_decision(q, rq)
        if s.now_ns < due < NEVER:
            if not idle:
                s.idle_from = s.now_ns
            s.at, s.wake_ns = AT_IDLE, due
            return
    if idle:
        until = s.now_ns
        s.now_ns = s.idle_from
        await_request(s, c, m, until)
    s.quota -= 1
    if scheduled:
        f.decided_ns = s.now_ns
        phase(s, c, m, x, f, SCHEDULE)
    else:
        bare_phase(s, c, m, x, SCHEDULE)
    if not scheduled and s.unread < 0:
        s.at = AT_END
        return
    if not c.asynchronous:
        enqueue_sync(s, c, m, x, f)
        s.unread = f.step
        synchronize(s, c, m, x, f)
        s.at = AT_UPDATE
        return
    if scheduled:
        enqueue_async(s, c, m, x, f)
    if s.unread >= 0:
        synchronize(s, c, m, x, _flight(s, flights, s.unread))
        s.at = AT_UPDATE
    else:
        s.unread = f.step
        s.at = AT_SCHEDULE


@njit
def _read(q: Any, s: Any, c: Any, rows: Any, flights: Any, m: Any, x: Any) -> None:
    """The host reads the oldest batch in flight, and tells the batcher."""
    f = _flight(s, flights, s.unread)
    phase(s, c, m, x, f, UPDATE)
    end = s.now_ns
    m[s.steps_at + s.steps] = end - s.last_update_ns - s.waited_ns
    s.steps += 1
    s.updates += 1
    batcher.update(q, s, rows, f, s.copies, end)
    s.last_update_ns, s.waited_ns = end, 0
    s.unread = f.step + 1 if s.step > f.step + 1 else -1
    s.at = AT_SCHEDULE


@njit
def _earliest(replicas: Any) -> Int:
    """The instance that goes on next; -1: none does."""
    best: Int = np.int64(-1)
    best_ns: Int = NEVER
    best_waits: Int = NEVER
    best_turn: Int = NEVER
    for k in range(len(replicas)):
        s = replicas[k]
        if s.at == AT_END:
            continue
        idle = s.at == AT_IDLE
        now = s.wake_ns if idle else s.now_ns
        waits = 0 if idle else 1
        if (
            now < best_ns
            or (now == best_ns and waits < best_waits)
            or (now == best_ns and waits == best_waits and s.turn < best_turn)
        ):
            best, best_ns, best_waits, best_turn = np.int64(k), now, waits, s.turn
    return best


def _make(digest: int) -> Callable[..., Int]:
    def serve(
        settings: Any, queue: Any, replicas: Any, rq: Any, rows: Any, flights: Any, m: Any, x: Any, closes: bool
    ) -> Int:
        """Let all instances serve on; whether they are DONE, or why they stopped.

        `closes`: attribute the idle time up to now, and nothing else; for the end of a run.
        """
        c, q = settings[0], queue[0]
        if closes:
            for k in range(len(replicas)):
                s, f = replicas[k], flights[2 * k]
                f.step = NO_STEP
                f.launch_start_ns = s.now_ns
                f.launched_ns = s.now_ns
                f.launch_end_ns = s.now_ns
                attribute(s, s.now_ns, f)
            return DONE
        while True:
            earliest = _earliest(replicas) if len(replicas) > 1 else np.int64(0)
            if earliest < 0 or replicas[earliest].at == AT_END:
                return DONE + 0 * digest  # for numba to see the digest
            s = replicas[earliest]
            if s.quota == 0 or q.batches == len(rows) or q.draws == q.draws_end:
                return QUOTA
            if s.at == AT_UPDATE:
                _read(q, s, c, rows, flights, m, x)
            _decide(q, s, c, rq, rows, flights, m, x)
            if s.log_step < 0 and c.log_steps > 0 and s.step >= c.log_steps and s.now_ns >= c.log_from_ns:
                s.log_step = s.step
            s.turn = q.turns
            q.turns += 1

    return entry(serve)


serve = _make(sources_digest())
