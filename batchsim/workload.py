"""Requests: when they arrive, how long they are, what they have in common; drawn, or read from a trace."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal
from zlib import crc32

import numpy as np
import numpy.typing as npt

from batchsim.dynamic_workload import DynamicWorkload, FixedRequests, RandomRequests
from batchsim.errors import InputError
from batchsim.traces import MAX_TIME_NS, Int64, Trace, read_trace
from batchsim.workload_scenario import (
    MAX_HASHES,
    PREFIX_BLOCK,
    Arrivals,
    Distribution,
    Diurnal,
    Empirical,
    Piece,
    RandomWorkload,
    SharedPrefix,
    TraceFormat,
    TraceWorkload,
    Workload,
)  # fmt: skip

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Requests:
    """Requests in order of arrival, arrays of one length; nanoseconds since the run began, lower priority more urgent.

    A request's prompt begins with blocks of `hash_tokens` tokens, the last of them perhaps partial; those of request i
    have the ids `hash_ids[hash_starts[i]:hash_starts[i + 1]]`. Where two ids are equal, so are the blocks and all that
    precedes them (Mooncake, arXiv:2407.00079). Without such ids `hash_tokens` is 0 and both arrays are empty.

    In a `closed` loop arrivals are all 0: a request arrives when it is let in, at most `max_concurrency` at once.
    Otherwise clients hold requests back while that many are outstanding. `dropped` counts those that a trace has
    without tokens.
    """

    arrival_ns: Int64
    prompt_tokens: Int64
    output_tokens: Int64
    priority: Int64
    hash_starts: Int64
    hash_ids: Int64
    hash_tokens: int
    closed: bool
    max_concurrency: int | None
    dropped: int

    def __len__(self) -> int:
        return len(self.arrival_ns)


def requests_of(workload: Workload | DynamicWorkload, *, seed: int, replication: int, base: Path = Path()) -> Requests:
    """The requests of a workload; a trace's path is relative to `base`. Those of dynamic batching have no output.

    Arrivals, lengths, priorities and prefixes come from streams of their own,
    `SeedSequence(seed, spawn_key=(replication, crc32(name)))`, so that none shifts another's draws.

    Raises:
        InputError: a trace that is none, or requests that this cannot hold. Without a file where the scenario is to
            blame; `InputError.within` adds it.
    """

    def stream(name: str) -> np.random.Generator:
        sequence = np.random.SeedSequence(seed, spawn_key=(replication, crc32(name.encode())))
        return np.random.Generator(np.random.PCG64(sequence))

    hash_starts = hash_ids = np.zeros(0, dtype=np.int64)
    hash_tokens = dropped = 0
    if isinstance(workload, TraceWorkload):
        trace = _trace(workload, base / workload.path)
        arrival_ns = _scaled(trace.arrival_ns, workload.rate_scale)
        prompt_tokens, output_tokens = trace.prompt_tokens, trace.output_tokens
        hash_starts, hash_ids, hash_tokens = trace.hash_starts, trace.hash_ids, trace.hash_tokens
        dropped = trace.dropped
    else:
        arrival_ns = _arrival_ns(workload, stream("arrivals"))
        prompt_tokens = _lengths("input_len", workload, stream("input_len"))
        if isinstance(workload, FixedRequests | RandomRequests):
            output_tokens = _all(len(arrival_ns), 0)
        else:
            output_tokens = _lengths("output_len", workload, stream("output_len"))
        if isinstance(workload, RandomWorkload) and workload.shared_prefix:
            hash_starts, hash_ids = _shared(workload.shared_prefix, prompt_tokens, stream("prefix"))
            hash_tokens = PREFIX_BLOCK
    if workload.priorities:
        classes = np.array([entry.priority for entry in workload.priorities], dtype=np.int64)
        shares = [entry.share for entry in workload.priorities]
        priority = classes[_picks(shares, len(arrival_ns), stream("priority"))]
    else:
        priority = _all(len(arrival_ns), 0)
    return Requests(
        arrival_ns=arrival_ns,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        priority=priority,
        hash_starts=hash_starts,
        hash_ids=hash_ids,
        hash_tokens=hash_tokens,
        closed=isinstance(workload, Arrivals) and workload.request_rate is None and bool(workload.max_concurrency),
        max_concurrency=workload.max_concurrency,
        dropped=dropped,
    )


def _all(count: int, value: int) -> Int64:
    """`count` times the same value, for which there is room once; not to be written to."""
    return np.broadcast_to(np.int64(value), count)


def _trace(workload: TraceWorkload, path: Path) -> Trace:
    """The trace at `path`; the same one is read once, for scenarios that differ in other things."""
    stamp = None
    if path.is_file():
        told = path.stat()
        stamp = told.st_mtime_ns, told.st_size, told.st_ino
    return _read(path, stamp, workload.format, workload.start, workload.limit, workload.no_output)


@lru_cache(maxsize=2)
def _read(
    path: Path,
    stamp: object,  # noqa: ARG001  # a file that has changed is another one
    trace_format: TraceFormat,
    start: int,
    limit: int | None,
    no_output: Literal["refuse", "drop"],
) -> Trace:
    trace = read_trace(path, trace_format, start=start, limit=limit, no_output=no_output)
    for name in ("arrival_ns", "prompt_tokens", "output_tokens", "hash_starts", "hash_ids"):
        getattr(trace, name).setflags(write=False)  # what is kept has to stay as it is
    return trace


def _scaled(arrival_ns: Int64, rate_scale: float) -> Int64:
    if rate_scale == 1:
        return arrival_ns
    return _whole_ns(arrival_ns / rate_scale, "rate_scale")


def _whole_ns(times_ns: Float64, key: str) -> Int64:
    if not times_ns[-1] <= MAX_TIME_NS:
        found = f"a last arrival after {times_ns[-1] / 1e9 / 86_400 / 365.25:,.0f} years"
        raise InputError(None, f"workload.{key}", found, "at most 146 years, what 64 bits of nanoseconds hold")
    return np.rint(times_ns).astype(np.int64)


def _arrival_ns(workload: Arrivals, generator: np.random.Generator) -> Int64:
    """A renewal process of rate 1 with gamma gaps, in the time in which the rate asked for is 1.

    Gaps are those of vLLM's benchmark, which however stretches all of them so that the last request arrives at
    num_prompts / request_rate.
    """
    if workload.request_rate is None:
        return np.zeros(workload.num_prompts, dtype=np.int64)
    gaps = generator.standard_gamma(workload.burstiness, workload.num_prompts)
    counts = np.cumsum(gaps / workload.burstiness)
    match workload.request_rate:
        case Diurnal() as swing:
            times_s = _swung(swing, counts)
        case tuple() as pieces:
            times_s = _pieced(pieces, counts)
        case rate:
            times_s = counts / rate
    return _whole_ns(times_s * 1e9, "request_rate")


def _pieced(pieces: tuple[Piece, ...], counts: Float64) -> Float64:
    """When the cumulated rate reaches each of `counts`, seconds."""
    rates = np.array([piece.rate for piece in pieces])
    durations = np.array([piece.duration_s or 0.0 for piece in pieces[:-1]])
    starts_s = np.concatenate([[0.0], np.cumsum(durations)])
    before = np.concatenate([[0.0], np.cumsum(rates[:-1] * durations)])
    # Of pieces that begin at the same count, the last: those before it have no arrivals.
    i = np.searchsorted(before, counts, side="right") - 1
    ends_s = np.append(starts_s[1:], math.inf)
    times_s: Float64 = np.minimum(starts_s[i] + (counts - before[i]) / rates[i], ends_s[i])
    return times_s


def _swung(swing: Diurnal, counts: Float64) -> Float64:
    """When the cumulated rate reaches each of `counts`, seconds.

    With x the phase since the peak, x + amplitude * sin(x) grows evenly (Kepler's equation).
    """
    amplitude, turn = swing.amplitude, 2 * math.pi
    first = turn * math.fmod(-swing.peak_s / swing.period_s, 1)
    first_even = first + amplitude * math.sin(first)
    periods, rest = np.divmod(counts / swing.mean / swing.period_s, 1)
    even = first_even + turn * rest
    grid = np.linspace(first, first + turn, 4097)
    x = np.interp(even, grid + amplitude * np.sin(grid), grid)
    # Newton's method; from a start within a cell of the grid it converges before the fifth step at any amplitude.
    for _ in range(5):
        x -= (x + amplitude * np.sin(x) - even) / (1 + amplitude * np.cos(x))
    # Rounding may exchange neighbours.
    times_s: Float64 = np.maximum.accumulate((periods + (x - first) / turn) * swing.period_s)
    return times_s


def _picks(weights: list[float], count: int, generator: np.random.Generator) -> npt.NDArray[np.intp]:
    """Indices, drawn in proportion to `weights`."""
    ends = np.cumsum(weights)
    return np.searchsorted(ends[:-1] / ends[-1], generator.random(count), side="right")


def _lengths(key: str, workload: Arrivals, generator: np.random.Generator) -> Int64:
    count = workload.num_prompts
    match getattr(workload, key):
        case Empirical(values=values, weights=weights):
            picks = _picks(list(weights or [1.0] * len(values)), count, generator)
            return np.array(values, dtype=np.int64)[picks]
        case Distribution() as distribution:
            drawn = distribution.draw(count, generator)
            if np.isnan(drawn).any():
                found = f"draws of {distribution.dist} that are no numbers"
                raise InputError(None, f"workload.{key}", found, "parameters that give numbers")
            return np.rint(np.clip(drawn, distribution.min, distribution.max)).astype(np.int64)
        case length:
            return _all(count, length)


def _shared(prefix: SharedPrefix, prompt_tokens: Int64, generator: np.random.Generator) -> tuple[Int64, Int64]:
    """(starts, ids) of the whole blocks that requests share; an id stands for a prefix and a place in it."""
    which = generator.integers(prefix.count, size=len(prompt_tokens))
    blocks = np.minimum(prompt_tokens, prefix.len) // PREFIX_BLOCK
    starts = np.concatenate([[0], np.cumsum(blocks)])
    if (total := int(starts[-1])) > MAX_HASHES:
        found = f"{total:,} blocks of {PREFIX_BLOCK} tokens that requests share"
        raise InputError(None, "workload.shared_prefix", found, f"at most {MAX_HASHES:,}, in fewer or shorter prefixes")
    ids = np.arange(total) + np.repeat(which * (prefix.len // PREFIX_BLOCK) - starts[:-1], blocks)
    return starts, ids
