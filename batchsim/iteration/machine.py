"""Compiled: one replica's machine, as `batchsim.machine` and `batchsim.streams` run the schedules sync and async.

Times are settled in the order of the program: nothing overtakes on a stream, each copy engine serves one stream, and
the launch queue is deep enough for two forwards. So when a command starts and ends follows from when its stream is
reached, its predecessor ended and the host issued it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from batchsim.iteration.compiled import Float, Int, njit
from batchsim.iteration.state import (
    BUILD_INPUTS,
    COPIES,
    COPY_IN,
    COPY_OUT,
    DECODE,
    DEVICE_COPY_IN,
    DEVICE_COPY_OUT,
    KERNEL_LAUNCH,
    LAUNCH,
    LAUNCH_LATENCY,
    LOG_COLUMNS,
    NO_REQUESTS,
    PREFILL,
    RECENT,
    RECORD,
    STREAM_WAIT,
    WAIT,
    WAKE_UP,
)  # fmt: skip

HOST_LANE, IN_LANE, COMPUTE_LANE, OUT_LANE = (np.int64(lane) for lane in range(4))
NO_STEP, ZERO = np.int64(-1), np.int64(0)


@njit
def _draw(s: Any, x: Any, name: Int) -> Float:
    at = s.positions[name]
    s.positions[name] = at + 1
    return x[at]


@njit
def _host_ns(s: Any, c: Any, x: Any, name: Int, seqs: Int, prefill_tokens: Int, admitted: Int, tokens: Int) -> Int:
    """See `batchsim.costs.ProfileCosts`; the same operations in the same order give the same bits."""
    ns = c.phases[name, 0] + c.phases[name, 1] * seqs
    ns = ns + (c.phases[name, 2] * prefill_tokens + c.phases[name, 3] * admitted)
    ns = ns + c.phases[name, 4] * tokens
    return np.int64(np.rint(ns * _draw(s, x, name) * c.scale))


@njit
def _log(s: Any, c: Any, m: Any, step: Int, lane: Int, stage: Int, start: Int, end: Int, gap: Int) -> None:
    if s.logged < c.log_rows:
        at = s.log_at + LOG_COLUMNS * s.logged
        m[at], m[at + 1], m[at + 2], m[at + 3], m[at + 4], m[at + 5] = step, lane, stage, start, end, gap
        s.logged += 1


@njit
def spend(s: Any, c: Any, m: Any, step: Int, stage: Int, cost: Int) -> None:
    """The host spends time on a phase."""
    start = s.now_ns
    s.now_ns = end = start + cost
    s.stage_ns[stage] += cost
    if stage != WAIT:
        at = s.recent_last & (RECENT - 1)
        s.recent[at, 0], s.recent[at, 1], s.recent[at, 2], s.recent[at, 3] = start, end, stage, step
        s.recent_last += 1
    if s.log_step >= 0:
        _log(s, c, m, step, HOST_LANE, stage, start, end, ZERO)


@njit
def phase(s: Any, c: Any, m: Any, x: Any, f: Any, stage: Int) -> None:
    """A host phase whose cost depends on the batch."""
    spend(s, c, m, f.step, stage, _host_ns(s, c, x, stage, f.seqs, f.prefill_tokens, f.admitted, f.tokens))


@njit
def bare_phase(s: Any, c: Any, m: Any, x: Any, stage: Int) -> None:
    """A host phase that no batch belongs to."""
    spend(s, c, m, NO_STEP, stage, _host_ns(s, c, x, stage, ZERO, ZERO, ZERO, ZERO))


@njit
def _line(m: Any, x: Any, value: Int, tokens_at: Int, ns_at: Int, count: Int) -> Float:
    """`batchsim.profile._line` over `count` points."""
    low, high = 0, count
    while low < high:  # as bisect_right
        middle = (low + high) // 2
        if value < m[tokens_at + middle]:
            high = middle
        else:
            low = middle + 1
    i = min(max(low, 1), count - 1)
    x0, x1, y0, y1 = m[tokens_at + i - 1], m[tokens_at + i], x[ns_at + i - 1], x[ns_at + i]
    return y0 + (y1 - y0) * (value - x0) / (x1 - x0)


@njit
def _note(s: Any, m: Any, what: Int, value: Int) -> None:
    """What was asked for outside the measured range."""
    at = s.extrapolated_at + 2 * what
    m[at] = min(m[at], value)
    m[at + 1] = max(m[at + 1], value)


@njit
def _decode_ns(s: Any, c: Any, m: Any, x: Any) -> Int:
    if c.table:
        return s.service_ns
    curve = m[c.curve_of_at + s.seqs]
    first = m[c.curve_starts_at + curve]
    count = m[c.curve_starts_at + curve + 1] - first
    if s.seqs > c.measured_seqs:
        _note(s, m, c.curves, s.seqs)
    if not m[c.curve_kv_at + first] * 0.5 <= s.kv_tokens <= m[c.curve_kv_at + first + count - 1] * 1.02:
        _note(s, m, curve, s.kv_tokens)
    ns = _line(m, x, s.kv_tokens, c.curve_kv_at + first, c.curve_ns_at + first, count) + x[c.beyond_ns_at + s.seqs]
    return np.int64(np.rint(ns * _draw(s, x, DECODE)))


@njit
def _prefill_ns(s: Any, c: Any, m: Any, x: Any) -> Int:
    if s.tokens > m[c.prefill_tokens_at + c.prefill_points - 1]:
        _note(s, m, c.curves + 1, s.tokens)
    decodes = s.tokens - s.prefill_tokens
    ns = _line(m, x, s.tokens, c.prefill_tokens_at, c.prefill_ns_at, c.prefill_points)
    ns = ns + c.pair_ns * s.pairs + c.depth_ns * s.depth
    if decodes:
        ns = ns + c.mixed_ns + c.row_ns * decodes + c.kv_ns * s.kv_tokens
    return np.int64(np.rint(ns * _draw(s, x, PREFILL)))


@njit
def _burst(c: Any, s: Any, f: Any, launch_ns: Int, kernels_ns: Int, alone_ns: Int, opens: bool) -> None:
    """The host launches kernels: see `batchsim.streams.Kernels`. It is busy with that until `f.launch_end_ns`."""
    now = f.launch_end_ns
    ready = now + c.launch_ns
    start = max(max(s.reached_ns, now), ready)
    if opens:
        start = f.start_ns = max(start, s.end_ns + c.event_gap_ns)
        f.gap_ns = 0
        f.launched_ns = now + launch_ns
    f.end_ns = s.reached_ns = s.end_ns = max(start + kernels_ns, ready + alone_ns)
    f.gap_ns += kernels_ns
    f.launch_end_ns = now + launch_ns


@njit
def launch(s: Any, c: Any, m: Any, x: Any, f: Any) -> None:
    """Launch a forward; when it starts and ends is known then."""
    f.launch_start_ns = f.launch_end_ns = s.now_ns
    prefill = s.prefill_tokens > 0
    if not c.overlaps:
        forward_ns = _prefill_ns(s, c, m, x) if prefill else _decode_ns(s, c, m, x)
        _burst(c, s, f, forward_ns, forward_ns, forward_ns, True)
    elif c.graphs and not prefill:
        host_ns = _host_ns(s, c, x, LAUNCH, f.seqs, f.prefill_tokens, f.admitted, f.tokens)
        forward_ns = _decode_ns(s, c, m, x)
        _burst(c, s, f, host_ns, forward_ns, forward_ns, True)
    else:
        host_ns = _host_ns(s, c, x, KERNEL_LAUNCH, ZERO, ZERO, ZERO, ZERO)
        if prefill:
            rows, device_ns, outer_share = s.tokens - s.prefill_tokens, np.float64(_prefill_ns(s, c, m, x)), 0.0
        else:
            rows = m[c.curve_sizes_at + m[c.curve_of_at + s.seqs]]
            device_ns, outer_share = _decode_ns(s, c, m, x) * c.eager_factor, c.outer_share
        count = c.per_layer
        if 0 < rows <= c.split_rows:
            count += 1
        each = np.int64(np.rint(device_ns * (1 - outer_share) / (c.layers * count)))
        final = np.int64(np.rint(device_ns * outer_share))
        _burst(c, s, f, c.first * host_ns, ZERO, (c.first - 1) * host_ns, True)
        alone = count * each + max(0, (count - 1) * (host_ns - each))
        for _ in range(c.layers):
            _burst(c, s, f, count * host_ns, count * each, alone, False)
        alone = final + max(0, (c.last - 1) * host_ns - final) if c.last > 1 else final
        _burst(c, s, f, c.last * host_ns, final, alone, False)
    f.gap_ns = f.end_ns - f.start_ns - f.gap_ns
    spend(s, c, m, f.step, LAUNCH, f.launch_end_ns - s.now_ns)
    duration = f.end_ns - f.start_ns
    stage = PREFILL if prefill else DECODE
    s.stage_ns[stage] += duration
    s.stage_steps[stage] += 1
    s.busy_ns += duration
    s.gap_ns += f.gap_ns
    if s.log_step >= 0:
        _log(s, c, m, f.step, COMPUTE_LANE, stage, f.start_ns, f.end_ns, f.gap_ns)


@njit
def _copied(s: Any, c: Any, m: Any, f: Any, lane: Int, reached: Int, ended: Int) -> Int:
    """When a copy that the host issues now ends, on a stream reached and last busy until then."""
    start = max(max(reached, s.now_ns + c.copy_ns), ended + c.event_gap_ns)
    if lane == OUT_LANE:
        ns, stage, which = c.copy_out_device_ns + c.copy_out_device_seq_ns * f.seqs, DEVICE_COPY_OUT, 1
    else:
        more_ns = c.copy_in_device_seq_ns * f.seqs + c.copy_in_device_token_ns * f.tokens
        ns, stage, which = c.copy_in_device_ns + more_ns, DEVICE_COPY_IN, 0
    duration = np.int64(np.rint(ns))
    s.stage_ns[stage] += duration
    s.stage_steps[stage] += 1
    at = f.step & (COPIES - 1)
    s.copies[which, at, 0], s.copies[which, at, 1] = start, start + duration
    if s.log_step >= 0:
        _log(s, c, m, f.step, lane, stage, start, start + duration, ZERO)
    return start + duration


@njit
def enqueue_sync(s: Any, c: Any, m: Any, x: Any, f: Any) -> None:
    """From the built inputs to the recorded event of `batchsim.schedules.sync`: all on the compute stream."""
    phase(s, c, m, x, f, BUILD_INPUTS)
    s.reached_ns = s.end_ns = _copied(s, c, m, f, IN_LANE, s.reached_ns, s.end_ns)
    phase(s, c, m, x, f, COPY_IN)
    launch(s, c, m, x, f)
    s.reached_ns = s.end_ns = _copied(s, c, m, f, OUT_LANE, s.reached_ns, s.end_ns)
    phase(s, c, m, x, f, COPY_OUT)
    s.reached_ns = f.done_ns = max(s.reached_ns, s.now_ns)
    bare_phase(s, c, m, x, RECORD)


@njit
def _after(reached: Int, now: Int, completed: Int, event_ns: Int) -> Int:
    """When a stream goes on that was made to wait, now, for an event."""
    reached = max(reached, now)
    return completed + event_ns if completed > reached else reached


@njit
def enqueue_async(s: Any, c: Any, m: Any, x: Any, f: Any) -> None:
    """From the built inputs to the last recorded event of `batchsim.schedules.async_`, on three streams."""
    phase(s, c, m, x, f, BUILD_INPUTS)
    s.in_reached_ns = s.in_end_ns = _copied(s, c, m, f, IN_LANE, s.in_reached_ns, s.in_end_ns)
    phase(s, c, m, x, f, COPY_IN)
    copied = s.in_reached_ns = max(s.in_reached_ns, s.now_ns)
    bare_phase(s, c, m, x, RECORD)
    s.reached_ns = _after(s.reached_ns, s.now_ns, copied, c.event_ns)
    bare_phase(s, c, m, x, STREAM_WAIT)
    launch(s, c, m, x, f)
    computed = s.reached_ns = max(s.reached_ns, s.now_ns)
    bare_phase(s, c, m, x, RECORD)
    s.out_reached_ns = _after(s.out_reached_ns, s.now_ns, computed, c.event_ns)
    bare_phase(s, c, m, x, STREAM_WAIT)
    s.out_reached_ns = s.out_end_ns = _copied(s, c, m, f, OUT_LANE, s.out_reached_ns, s.out_end_ns)
    phase(s, c, m, x, f, COPY_OUT)
    s.out_reached_ns = f.done_ns = max(s.out_reached_ns, s.now_ns)
    bare_phase(s, c, m, x, RECORD)


@njit
def synchronize(s: Any, c: Any, m: Any, x: Any, f: Any) -> None:
    """The host waits for the batch; the idle time before its forward is attributed."""
    end = s.now_ns + _host_ns(s, c, x, WAIT, f.seqs, f.prefill_tokens, f.admitted, f.tokens)
    if f.done_ns > s.now_ns:
        end = max(end, f.done_ns + c.wake_up_ns)
    spend(s, c, m, f.step, WAIT, end - s.now_ns)
    # By now the host's phases before the forward began are all known.
    attribute(s, f.start_ns, f)
    s.device_end_ns = f.end_ns


@njit
def attribute(s: Any, end: Int, f: Any) -> None:
    """`batchsim.metrics.Metrics._attribute`, of the gap that ends at `end` with the forward of `f`."""
    start = s.device_end_ns
    recent, mask = s.recent, RECENT - 1
    while s.recent_first < s.recent_last and recent[s.recent_first & mask, 1] <= start:
        s.recent_first += 1
    if end <= start:
        return
    ins, outs = s.copies[0], s.copies[1]
    copying = False
    for i in range(COPIES):
        copying = copying or (ins[i, 1] > start and ins[i, 0] < end)
    if f.launch_end_ns <= start and not copying:  # the usual case of a busy device
        s.idle_ns[LAUNCH_LATENCY] += end - start
        return
    s.gaps[0, 0], s.gaps[0, 1] = start, end
    left = 1
    for i in range(COPIES):
        left = _claim(s, left, DEVICE_COPY_IN, ins[i, 0], ins[i, 1])
    left = _claim(s, left, LAUNCH, f.launch_start_ns, f.launch_end_ns)
    left = _claim(s, left, LAUNCH_LATENCY, f.launched_ns, end)
    for i in range(s.recent_first, s.recent_last):
        at = i & mask
        if left == 0 or recent[at, 0] >= end:
            break
        if recent[at, 2] != LAUNCH or recent[at, 3] != f.step:
            left = _claim(s, left, recent[at, 2], recent[at, 0], recent[at, 1])
    copied = start
    for i in range(COPIES):
        if outs[i, 1] > start and outs[i, 0] < end:
            copied = max(copied, outs[i, 1])
    left = _claim(s, left, DEVICE_COPY_OUT, start, copied)
    _claim(s, left, WAKE_UP, start, end)


@njit
def _claim(s: Any, count: Int, stage: Int, first: Int, last: Int) -> Int:
    """Give what is left of the gap between `first` and `last` to `stage`; how many pieces are left."""
    gaps = s.gaps
    i = 0
    while i < count:
        left, right = gaps[i, 0], gaps[i, 1]
        if last <= left or right <= first:
            i += 1
            continue
        s.idle_ns[stage] += min(last, right) - max(first, left)
        if left < first and last < right:
            gaps[i, 1] = first
            gaps[count, 0], gaps[count, 1] = last, right
            count += 1
        elif left < first:
            gaps[i, 1] = first
        elif last < right:
            gaps[i, 0] = last
        else:
            count -= 1
            gaps[i, 0], gaps[i, 1] = gaps[count, 0], gaps[count, 1]
            continue
        i += 1
    return count


@njit
def await_request(s: Any, c: Any, m: Any, until: Int) -> None:
    """The host has nothing to do until then."""
    waited = until - s.now_ns
    s.waited_ns += waited
    spend(s, c, m, NO_STEP, NO_REQUESTS, waited)
