"""Compiled: the decisions of `batchsim.batching.dynamic.DynamicBatcher`.

Requests come to the queue in the order of their numbers, and become late in that order, too. So those that wait in time
are found from the first that may on, those that are late from the first that may be, each passed over once. With
several classes each has a list of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from batchsim.answered import ACCEPTED, DROPPED, REFUSED, SERVED_LATE
from batchsim.iteration.compiled import Bool, Int, njit
from batchsim.iteration.dynamic_state import IN_TIME, LATE, LEFT
from batchsim.iteration.state import NEVER

NONE = np.int64(-1)


@njit
def _first(q: Any, rq: Any) -> Int:
    """The request that waits in time and came first."""
    while q.first < q.next and rq[q.first].state != IN_TIME:
        q.first += 1
    return q.first if q.first < q.next else NONE


@njit
def _first_late(q: Any, rq: Any) -> Int:
    """The first of the late ones, of which there are some."""
    while rq[q.first_late].state != LATE:
        q.first_late += 1
    return q.first_late


@njit
def _first_of(q: Any, rq: Any, m: Any, kind: Int) -> Int:
    """The request of a class that waits in time and came first."""
    head = m[q.heads_at + kind]
    while head >= 0 and rq[head].state != IN_TIME:
        head = rq[head].link
    m[q.heads_at + kind] = head
    return head


@njit
def _oldest(q: Any, rq: Any) -> Int:
    return _first_late(q, rq) if q.late > 0 else _first(q, rq)


@njit
def _submit(q: Any, rq: Any, m: Any, number: Int) -> None:
    r = rq[number]
    q.arrivals += 1
    if q.waiting >= q.max_queue_size:
        r.state, r.outcome, r.left_ns = LEFT, REFUSED, r.arrival_ns
        q.lost += 1
        return
    r.state = IN_TIME
    q.waiting += 1
    if q.classes > 1:
        r.link = -1
        if _first_of(q, rq, m, r.kind) < 0:
            m[q.heads_at + r.kind] = number
        else:
            rq[m[q.tails_at + r.kind]].link = number
        m[q.tails_at + r.kind] = number


@njit
def _expire(q: Any, rq: Any, now: Int) -> Int:
    """Drop or put back the requests that have waited too long by now; how many have left the queue."""
    if q.queue_timeout_ns == NEVER:
        return 0
    gone = 0
    number = _first(q, rq)
    while number >= 0 and rq[number].entered_ns + q.queue_timeout_ns < now:
        r = rq[number]
        if q.drops:
            r.state, r.outcome, r.left_ns = LEFT, DROPPED, r.entered_ns + q.queue_timeout_ns
            gone += 1
        else:
            r.state = LATE
            q.late += 1
        number = _first(q, rq)
    q.waiting -= gone
    q.lost += gone
    return gone


@njit
def _arrive(q: Any, rq: Any, m: Any, now: Int) -> None:
    if q.held:
        q.room_ns = now
    while q.next < len(rq) and rq[q.next].arrival_ns <= now:
        if q.waiting + q.in_flight >= q.max_concurrency:
            if _expire(q, rq, now) == 0:
                break
            q.room_ns = now
            continue
        r = rq[q.next]
        r.entered_ns = max(r.arrival_ns, q.room_ns)
        if q.closed:
            r.arrival_ns = r.entered_ns
        _expire(q, rq, r.entered_ns)
        _submit(q, rq, m, q.next)
        q.next += 1
    q.held = q.next < len(rq) and rq[q.next].arrival_ns <= now
    _expire(q, rq, now)


@njit
def _take(q: Any, rq: Any, m: Any, now: Int) -> Int:
    """Take the request out of the queue whose turn it is."""
    number = _first(q, rq)
    if number < 0:
        number = _first_late(q, rq)
        q.late -= 1
        rq[number].outcome = SERVED_LATE
    else:
        in_turn = q.max_priority_wait_ns == NEVER or rq[number].entered_ns + q.max_priority_wait_ns >= now
        if q.classes > 1 and in_turn:
            number = NONE
            kind = 0
            while number < 0:
                number = _first_of(q, rq, m, kind)
                kind += 1
        rq[number].outcome = ACCEPTED
    rq[number].state, rq[number].left_ns = LEFT, now
    q.waiting -= 1
    return number


@njit
def next_decision(q: Any, rq: Any) -> Int:
    """When `schedule` may answer differently, or NEVER."""
    moment = NEVER
    if q.next < len(rq) and not q.held:
        moment = rq[q.next].arrival_ns
    if q.waiting > 0:
        moment = min(moment, rq[_oldest(q, rq)].entered_ns + q.max_queue_delay_ns)
    return moment


@njit
def schedule(q: Any, s: Any, c: Any, rq: Any, rows: Any, m: Any, f: Any) -> Bool:
    """Form the next batch, in `f`; whether there is one."""
    now = s.now_ns
    _arrive(q, rq, m, now)
    if q.waiting == 0:
        return False
    filled = 0
    for i in range(q.preferred_at, q.preferred_at + q.preferred):
        if m[i] <= q.waiting:
            filled = m[i]
    waited = now - rq[_oldest(q, rq)].entered_ns >= q.max_queue_delay_ns
    if filled > 0 and not (waited and q.max_queue_delay_ns > 0):
        count = filled
    elif waited:
        count = min(q.waiting, q.max_batch_size)
    else:
        return False
    longest, late, batch = 0, 0, q.batches
    for _ in range(count):
        number = _take(q, rq, m, now)
        rq[number].batch = batch
        late += rq[number].outcome == SERVED_LATE
        longest = max(longest, rq[number].tokens)
    padded = max((longest + q.length_bucket - 1) // q.length_bucket, 1) * q.length_bucket
    q.in_flight += count
    q.batches += 1
    row = rows[batch]
    row.size, row.padded_len, row.instance, row.decided_ns, row.finished_ns = count, padded, s.number, now, -1
    s.seqs = s.admitted = count
    s.tokens = count * padded
    if c.table:
        s.service_ns = m[q.times_at + count * q.bins + m[q.draws_at + q.draws]]
        q.draws += 1
    else:
        s.kv_tokens = padded * max(m[c.curve_sizes_at + m[c.curve_of_at + count]], count)
    f.step, f.batch, f.seqs, f.tokens, f.admitted, f.late = s.step, batch, count, s.tokens, count, late
    s.step += 1
    s.decisions += 1
    s.events += 1
    return True


@njit
def update(q: Any, s: Any, rows: Any, f: Any, copies: Any, end: Int) -> None:
    """The answers of the batch `f` have been read by `end`; its copies were in these places."""
    q.in_flight -= f.seqs
    q.finished += f.seqs
    q.served_late += f.late
    row = rows[f.batch]
    at = f.step & (len(copies[0]) - 1)
    row.copies_in_ns, row.copied_in_ns = copies[0, at, 0], copies[0, at, 1]
    row.computes_ns, row.computed_ns = f.start_ns, f.end_ns
    row.copies_out_ns, row.copied_out_ns = copies[1, at, 0], copies[1, at, 1]
    row.finished_ns = end
    s.finished += f.seqs
