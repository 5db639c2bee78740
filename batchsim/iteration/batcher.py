"""Compiled: the decisions of `batchsim.batching.continuous.ContinuousBatcher`.

A decoding request holds one token more after every step, so its context, its blocks and the step of its last token
follow from the step at which it began to decode. Sums over the decoding requests are kept, each a function of the step:
their contexts as `kv_base + decoding * step`, and in `needs` how many of them fill a block at a step, by its
remainder. A step that changes nothing costs the same for any batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from batchsim.iteration import cache
from batchsim.iteration.compiled import Bool, Int, njit
from batchsim.iteration.state import DECODING, FINISHED, NEVER, PREFILLING, WAITING
from batchsim.served import MAX_MOMENTS


@njit
def _blocks(tokens: Int, size: Int) -> Int:
    return (tokens + size - 1) // size


@njit
def _wait(s: Any, rq: Any, m: Any, number: Int) -> None:
    """Put a request into the queue, a heap ordered by rank."""
    rank = rq[number].rank
    queue, at = s.queue_at, s.waiting
    while at > 0 and rq[m[queue + (at - 1) // 2]].rank > rank:
        m[queue + at] = m[queue + (at - 1) // 2]
        at = (at - 1) // 2
    m[queue + at] = number
    rq[number].state = WAITING
    s.waiting += 1


@njit
def _sift(s: Any, rq: Any, m: Any, at: Int, number: Int) -> None:
    """Put a request into the heap at `at` or below."""
    rank = rq[number].rank
    queue = s.queue_at
    while True:
        child = 2 * at + 1
        if child >= s.waiting:
            break
        if child + 1 < s.waiting and rq[m[queue + child + 1]].rank < rq[m[queue + child]].rank:
            child += 1
        if rq[m[queue + child]].rank >= rank:
            break
        m[queue + at] = m[queue + child]
        at = child
    m[queue + at] = number


@njit
def _pop(s: Any, rq: Any, m: Any) -> None:
    """Take the first request out of the queue."""
    s.waiting -= 1
    if s.waiting > 0:
        _sift(s, rq, m, np.int64(0), m[s.queue_at + s.waiting])


@njit
def _drop_finished(s: Any, rq: Any, m: Any) -> None:
    """Take finished requests out of the queue."""
    left = s.queue_at
    for i in range(s.queue_at, s.queue_at + s.waiting):
        if rq[m[i]].state != FINISHED:
            m[left] = m[i]
            left += 1
    s.waiting = left - s.queue_at
    for at in range(s.waiting // 2 - 1, -1, -1):
        _sift(s, rq, m, at, m[s.queue_at + at])


@njit
def accept(s: Any, rq: Any, m: Any, number: Int) -> None:
    """A request arrives at this replica."""
    rq[number].replica = s.number
    _wait(s, rq, m, number)
    s.accepted += 1


@njit
def arrive(s: Any, c: Any, rq: Any, m: Any) -> Int:
    """Let in what has arrived by now, and count it."""
    before = s.accepted
    while s.next < s.stop and rq[s.next].arrival_ns <= s.now_ns:
        if s.accepted - s.finished >= c.max_concurrency:
            break
        if c.closed:
            rq[s.next].arrival_ns = s.now_ns
        accept(s, rq, m, s.next)
        s.next += s.stride
    return s.accepted - before


@njit
def _take(s: Any, c: Any, m: Any, count: Int) -> None:
    s.used += count
    while s.used + s.unused > c.num_kv_blocks:
        cache.evict(s, m)


@njit
def _held(c: Any, r: Any, steps: Int) -> Int:
    """Blocks that a running request holds once `steps` steps have been decided."""
    if c.reserve:
        return _blocks(r.prompt_tokens + r.output_tokens + 1, c.block_size)
    return _blocks(_computed(r, steps), c.block_size)


@njit
def _computed(r: Any, steps: Int) -> Int:
    """Tokens of a running request in the cache once `steps` steps have been decided."""
    if r.state == DECODING and steps > r.decodes_from:
        return r.prefill_len + steps - r.decodes_from
    return r.computed


@njit
def _release(s: Any, c: Any, m: Any, r: Any, blocks: Int) -> None:
    """Take back the blocks of a request."""
    s.used -= blocks - r.registered
    for block in range(r.registered - 1, -1, -1):
        cache.leave(s, m, cache.find(s, m, cache.block_key(c, m, r, block)))
    r.registered = 0


@njit
def _residue(c: Any, r: Any) -> Int:
    return (r.decodes_from - r.prefill_len) & (c.block_size - 1)


@njit
def _stop_decoding(s: Any, c: Any, m: Any, r: Any) -> None:
    s.decoding -= 1
    s.kv_base -= r.prefill_len - r.decodes_from + 1
    m[s.needs_at + _residue(c, r)] -= 1


@njit
def _preempt(s: Any, c: Any, rq: Any, m: Any, grown: Int) -> Int:
    """Take the blocks of the running request that stands last, and return where it was among them.

    The first `grown` of the running ones have been given their block for this step.
    """
    running = s.running_at
    last = 0
    for i in range(1, s.running):
        if rq[m[running + i]].rank > rq[m[running + last]].rank:
            last = i
    number = m[running + last]
    r = rq[number]
    steps = s.step + 1 if last < grown else s.step
    _release(s, c, m, r, _held(c, r, steps))
    if r.state == DECODING:
        _stop_decoding(s, c, m, r)
        r.generated += s.step - r.decodes_from + 1
        if s.unread == s.step - 1:
            m[s.late_at + s.late] = number  # its token of that step is on its way
            s.late += 1
        else:
            r.last_token_ns = s.last_update_ns
    else:
        s.partial = -1
    for i in range(last, s.running - 1):
        m[running + i] = m[running + i + 1]
    s.running -= 1
    r.preemptions += 1
    s.preempted += 1
    _wait(s, rq, m, number)
    return last


@njit
def _make_room(s: Any, c: Any, rq: Any, m: Any) -> Bool:
    """Blocks for the next tokens of all that run; whether a request had to be preempted for that."""
    preempted = False
    size = c.block_size
    need = m[s.needs_at + (s.step & (size - 1))]
    if need <= c.num_kv_blocks - s.used:
        _take(s, c, m, need)
    else:
        at = 0
        while at < s.running:
            r = rq[m[s.running_at + at]]
            if r.state != DECODING or (s.step - _residue(c, r)) & (size - 1):
                at += 1
                continue
            gone = False
            while c.num_kv_blocks - s.used < 1:
                preempted = True
                last = _preempt(s, c, rq, m, at)
                gone = last == at
                if last < at:
                    at -= 1
                if gone:
                    break
            if not gone:
                _take(s, c, m, 1)
                at += 1
    while s.partial >= 0:
        r = rq[s.partial]
        tokens = min(r.prefill_len - r.computed, c.max_num_batched_tokens - s.decoding)
        need = _blocks(r.computed + tokens, size) - _blocks(r.computed, size)
        if need <= c.num_kv_blocks - s.used:
            _take(s, c, m, need)
            break
        preempted = True
        _preempt(s, c, rq, m, s.running)
    return preempted


@njit
def _cached(s: Any, c: Any, m: Any, r: Any, prefill_len: Int) -> tuple[Int, Int]:
    """The cached blocks that a request may begin with, leaving a token to compute; and those that no one uses."""
    shared = unused = 0
    if c.prefix_caching:
        most = min(prefill_len - 1, r.prompt_tokens, r.hashes * c.hash_tokens) // c.block_size
        while shared < most:
            entry = cache.find(s, m, cache.block_key(c, m, r, shared))
            if entry < 0:
                break
            unused += m[entry + cache.USERS] == 0
            shared += 1
    return shared, unused


@njit
def _admit(s: Any, c: Any, rq: Any, m: Any, number: Int, budget: Int) -> Bool:
    """Give a waiting request its first blocks, if they and the tokens that it needs at once are there."""
    r = rq[number]
    size = c.block_size
    prefill_len = r.prompt_tokens + r.generated
    shared, unused = _cached(s, c, m, r, prefill_len)
    context = shared * size
    left = prefill_len - context
    if left > budget and not c.chunked_prefill:
        return False
    tokens = r.prompt_tokens + r.output_tokens + 1 if c.reserve else context + min(left, budget)
    need = _blocks(tokens, size) - shared
    if need > c.num_kv_blocks - s.used - unused:
        return False
    for block in range(shared):
        cache.share(s, m, cache.find(s, m, cache.block_key(c, m, r, block)))
    _take(s, c, m, need)
    r.prefill_len, r.computed, r.registered = prefill_len, context, shared
    if r.started_ns < 0:
        r.started_ns, r.cached_tokens = s.now_ns, context
    return True


@njit
def _prefill(s: Any, c: Any, rq: Any, m: Any, number: Int, budget: Int) -> Int:
    """The next chunk of a prompt, as the budget allows; its tokens."""
    r = rq[number]
    context = r.computed
    tokens = min(r.prefill_len - context, budget)
    tiles = (tokens + c.tile - 1) // c.tile
    s.pairs += c.tile * ((tiles - 1) * context + c.tile * tiles * (tiles - 1) // 2 + context + tokens)
    s.depth = max(s.depth, context + tokens)
    s.seqs += 1
    s.prefill_tokens += tokens
    r.computed = context + tokens
    if c.prefix_caching:
        filled = min(r.computed, min(r.prompt_tokens, r.hashes * c.hash_tokens)) // c.block_size
        while r.registered < filled:
            if not cache.register(s, m, cache.block_key(c, m, r, r.registered)):
                break
            r.registered += 1
    return tokens


@njit
def _begin_decoding(s: Any, c: Any, m: Any, r: Any) -> None:
    """The last chunk of a prompt is in this step: from the next one on the request decodes."""
    r.state = DECODING
    r.decodes_from = s.step + 1
    r.finish_step = s.step + r.output_tokens - r.generated - 1
    s.next_finish = min(s.next_finish, r.finish_step)
    s.decoding += 1
    s.kv_base += r.prefill_len - r.decodes_from + 1
    if not c.reserve:
        m[s.needs_at + _residue(c, r)] += 1


@njit
def schedule(s: Any, c: Any, rq: Any, m: Any, f: Any) -> Bool:
    """Form the next batch, in `f`; whether there is one."""
    arrived = arrive(s, c, rq, m)
    s.events += arrived
    if s.running == 0 and s.waiting == 0:
        return False
    preempted = False
    if not c.reserve:
        preempted = _make_room(s, c, rq, m)
    decodes = s.decoding
    s.seqs, s.prefill_tokens, s.pairs, s.depth, s.admitted = decodes, 0, 0, 0, 0
    s.kv_tokens = s.kv_base + decodes * s.step
    budget = c.max_num_batched_tokens - decodes
    finals = 0
    slot = s.finals_at + (s.step & 1) * c.max_num_seqs
    if s.partial >= 0 and budget > 0:
        number = s.partial
        budget -= _prefill(s, c, rq, m, number, budget)
        if rq[number].computed >= rq[number].prefill_len:
            s.partial = -1
            _begin_decoding(s, c, m, rq[number])
            m[slot + finals] = number
            finals += 1
    while s.waiting > 0 and budget > 0 and s.running < c.max_num_seqs and not preempted:
        number = m[s.queue_at]
        if not _admit(s, c, rq, m, number, budget):
            break
        _pop(s, rq, m)
        m[s.running_at + s.running] = number
        s.running += 1
        s.admitted += 1
        budget -= _prefill(s, c, rq, m, number, budget)
        r = rq[number]
        if r.computed >= r.prefill_len:
            _begin_decoding(s, c, m, r)
            m[slot + finals] = number
            finals += 1
        else:
            r.state = PREFILLING
            s.partial = number
    if s.seqs == 0:
        return False
    s.tokens = decodes + s.prefill_tokens
    f.step, f.seqs, f.tokens, f.prefill_tokens, f.admitted = s.step, s.seqs, s.tokens, s.prefill_tokens, s.admitted
    f.decodes, f.wasted, f.finals = decodes, 0, finals
    m[s.batch_sizes_at + s.seqs] += 1
    if s.step & (s.moment_stride - 1) == 0:
        note_moment(s)
    if s.prefill_tokens > 0 or preempted:
        s.decisions += 1
        s.events += 1
    s.step += 1
    return True


@njit
def note_moment(s: Any) -> None:
    moments = s.series
    at = s.moments
    moments[at, 0], moments[at, 1], moments[at, 2], moments[at, 3] = s.now_ns, s.running, s.waiting, s.used
    s.moments = at + 1
    if s.moments == MAX_MOMENTS:
        for i in range(MAX_MOMENTS // 2):
            for column in range(4):
                moments[i, column] = moments[2 * i, column]
        s.moments = MAX_MOMENTS // 2
        s.moment_stride *= 2


@njit
def update(s: Any, c: Any, rq: Any, m: Any, f: Any, following: Any, end_ns: Int) -> None:
    """Count the tokens of the batch `f`, read by `end_ns`, and retire requests. `following` is in flight after it."""
    step = f.step
    fresh = f.decodes - f.wasted + f.finals
    s.output_tokens += fresh
    s.wasted_tokens += f.wasted
    if c.keep_tokens:
        _keep_tokens(s, c, rq, m, f, end_ns)
    for i in range(f.finals):
        r = rq[m[s.finals_at + (step & 1) * c.max_num_seqs + i]]
        if r.first_token_ns < 0:
            r.first_token_ns = end_ns
        elif end_ns > c.warm_up_ns:
            m[s.extras_at + s.extras] = end_ns - r.last_token_ns
            s.extras += 1
    ended = False
    for i in range(s.late):
        r = rq[m[s.late_at + i]]
        r.last_token_ns = end_ns
        if r.finish_step == step:
            r.state, r.finished_ns = FINISHED, end_ns
            s.finished += 1
            ended = True
    s.late = 0
    if ended:
        _drop_finished(s, rq, m)
    if s.next_finish <= step:
        ended = True
        _retire(s, c, rq, m, following, step, end_ns)
    if ended:
        s.decisions += 1
        s.events += 1


@njit
def _retire(s: Any, c: Any, rq: Any, m: Any, following: Any, step: Int, end_ns: Int) -> None:
    """Let go of the requests whose last token was of `step`."""
    running = s.running_at
    left, s.next_finish = 0, NEVER
    for i in range(s.running):
        number = m[running + i]
        r = rq[number]
        if r.state == DECODING and r.finish_step <= step:
            _release(s, c, m, r, _held(c, r, s.step))
            _stop_decoding(s, c, m, r)
            if s.step > step + 1:
                following.wasted += 1
            r.state, r.generated, r.finished_ns = FINISHED, r.output_tokens, end_ns
            s.finished += 1
            continue
        if r.state == DECODING:
            s.next_finish = min(s.next_finish, r.finish_step)
        m[running + left] = number
        left += 1
    s.running = left


@njit
def _keep_tokens(s: Any, c: Any, rq: Any, m: Any, f: Any, end_ns: Int) -> None:
    finals, at = s.finals_at + (f.step & 1) * c.max_num_seqs, s.tokens_at + 2 * s.tokens_kept
    for i in range(f.finals):
        m[at], m[at + 1] = m[finals + i], end_ns
        at += 2
    for i in range(s.running + s.late):
        number = m[s.running_at + i] if i < s.running else m[s.late_at + i - s.running]
        r = rq[number]
        decoded = r.state == DECODING or i >= s.running
        if decoded and r.decodes_from <= f.step <= r.finish_step:
            m[at], m[at + 1] = number, end_ns
            at += 2
    s.tokens_kept = (at - s.tokens_at) // 2


@njit
def cached_blocks(s: Any, c: Any, rq: Any, m: Any, number: Int) -> Int:
    """Blocks of a request's prompt that this replica has cached."""
    r = rq[number]
    return _cached(s, c, m, r, r.prompt_tokens)[0]
