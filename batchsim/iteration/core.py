"""Compiled: the loops of the schedules sync and async, and the router before several replicas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from batchsim.iteration import batcher
from batchsim.iteration.compiled import Bool, Int, entry, njit, sources_digest
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
    AT_SCHEDULE,
    AT_UPDATE,
    DONE,
    NEVER,
    PAUSED,
    QUOTA,
    SCHEDULE,
    UPDATE,
)  # fmt: skip
from batchsim.router import BALANCE_FACTOR, BALANCE_REQUESTS, CACHED_SHARE, ROUTERS

PREFIX_AWARE = ROUTERS.index("prefix_aware")


@njit
def _flight(s: Any, flights: Any, step: Int) -> Any:
    return flights[2 * s.number + (step & 1)]


@njit
def _awaits_router(s: Any) -> Bool:
    """Whether a replica has nothing to run or to read, and a router may bring something."""
    return s.more and s.running == 0 and s.waiting == 0 and s.unread < 0


@njit
def _idle(s: Any, c: Any, m: Any, until: Int) -> None:
    """A replica without requests waits for the next one, or for the end."""
    if until > s.now_ns:
        batcher.note_moment(s)
        await_request(s, c, m, until)


@njit
def _decide(s: Any, c: Any, rq: Any, flights: Any, m: Any, x: Any) -> None:
    """From a decision to the host's return from waiting for the batch whose results it reads next."""
    f = _flight(s, flights, s.step)
    scheduled = batcher.schedule(s, c, rq, m, f)
    while not scheduled and s.unread < 0 and s.next < s.stop:
        _idle(s, c, m, rq[s.next].arrival_ns)
        s.events += 1
        scheduled = batcher.schedule(s, c, rq, m, f)
    if scheduled:
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


@njit
def _read(s: Any, c: Any, rq: Any, flights: Any, m: Any, x: Any) -> None:
    """The host reads the oldest batch in flight, and tells the batcher."""
    f, following = _flight(s, flights, s.unread), _flight(s, flights, s.unread + 1)
    phase(s, c, m, x, f, UPDATE)
    end = s.now_ns
    m[s.steps_at + s.steps] = end - s.last_update_ns - s.waited_ns
    m[s.weights_at + s.steps] = f.decodes - f.wasted if end > c.warm_up_ns else 0
    s.steps += 1
    s.updates += 1
    batcher.update(s, c, rq, m, f, following, end)
    s.last_update_ns, s.waited_ns = end, 0
    s.unread = f.step + 1 if s.step > f.step + 1 else -1
    s.at = AT_SCHEDULE


@njit
def _advance(s: Any, c: Any, rq: Any, flights: Any, m: Any, x: Any, until: Int) -> Int:
    """Let a replica go on until it would decide or read at `until` or later; why it stopped."""
    while s.at != AT_END:
        if s.now_ns >= until:
            return PAUSED
        if s.at == AT_UPDATE:
            _read(s, c, rq, flights, m, x)
            continue
        if _awaits_router(s):
            return PAUSED
        if s.quota == 0 or s.extras + c.max_num_seqs > c.extras_size:
            return QUOTA
        if c.keep_tokens and s.tokens_kept + 4 * c.max_num_seqs > c.tokens_size:
            return QUOTA
        s.quota -= 1
        _decide(s, c, rq, flights, m, x)
        if s.log_step < 0 and c.log_steps > 0 and s.step >= c.log_steps and s.now_ns >= c.log_from_ns:
            s.log_step = s.step
    return DONE


@njit
def _choose(replicas: Any, c: Any, rq: Any, m: Any, number: Int) -> Int:
    """The replica for a request: see `batchsim.router`."""
    least, fewest, most = 0, NEVER, 0
    for k in range(len(replicas)):
        outstanding = replicas[k].accepted - replicas[k].finished
        if outstanding < fewest:
            least, fewest = k, outstanding
        most = max(most, outstanding)
    if c.router != PREFIX_AWARE or (most - fewest > BALANCE_REQUESTS and most > BALANCE_FACTOR * fewest):
        return least
    best, longest = least, 0
    for k in range(len(replicas)):
        found = batcher.cached_blocks(replicas[k], c, rq, m, number)
        if found > longest:
            best, longest = k, found
    return best if longest * c.block_size >= CACHED_SHARE * rq[number].prompt_tokens else least


@njit
def _route(replicas: Any, c: Any, rq: Any, flights: Any, m: Any, x: Any) -> Int:
    """Hand out requests as they arrive; why that stopped."""
    while c.next_routed < len(rq):
        number = c.next_routed
        now = rq[number].arrival_ns
        for k in range(len(replicas)):
            if _advance(replicas[k], c, rq, flights, m, x, now) == QUOTA:
                return QUOTA
        s = replicas[_choose(replicas, c, rq, m, number)]
        _idle(s, c, m, now)
        batcher.accept(s, rq, m, number)
        s.events += 1
        c.next_routed += 1
        c.routed_ns = now
    for k in range(len(replicas)):
        s = replicas[k]
        if _awaits_router(s):
            _idle(s, c, m, c.routed_ns)
        s.more = 0
    return DONE


def _make(digest: int) -> Callable[..., Int]:
    def serve(settings: Any, replicas: Any, rq: Any, flights: Any, m: Any, x: Any, closes: bool) -> Int:
        """Let all replicas serve on; whether they are DONE, or why they stopped.

        `closes`: attribute the idle time up to now, and nothing else; for the end of a run.
        """
        c = settings[0]
        stopped = DONE
        if closes:
            for k in range(len(replicas)):
                s, f = replicas[k], flights[2 * k]
                f.step = NO_STEP
                f.launch_start_ns = s.now_ns
                f.launched_ns = s.now_ns
                f.launch_end_ns = s.now_ns
                attribute(s, s.now_ns, f)
            return stopped
        if c.next_routed < len(rq):
            stopped = _route(replicas, c, rq, flights, m, x)
            if stopped != DONE:
                return stopped
        for k in range(len(replicas)):
            stopped = max(stopped, _advance(replicas[k], c, rq, flights, m, x, NEVER))
        return stopped + 0 * digest  # for numba to see the digest

    return entry(serve)


serve = _make(sources_digest())
