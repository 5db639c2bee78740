"""What became of each request of a run: the one table that metrics, reports and Parquet files are made from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]


# Moments of a series at most; then every other one is dropped, and half as many are taken from there on.
MAX_MOMENTS = 2048


@dataclass(frozen=True, slots=True)
class Series:
    """The state of all replicas together at moments of a run, arrays of one length, at most `MAX_MOMENTS`.

    `time_ns` since the run began; `running` and `waiting` requests and `kv_blocks` in use after a decision then.
    """

    time_ns: Int64
    running: Int64
    waiting: Int64
    kv_blocks: Int64


@dataclass(frozen=True, slots=True)
class Served:
    """One run's requests in the order in which they arrived, arrays of one length; nanoseconds since the run began.

    What has not happened (in a run that was interrupted) is -1. `arrival_ns` is the intended arrival; `started_ns` the
    decision that first put the request into a batch; `first_token_ns` and `finished_ns` the ends of the updates that
    read its first and its last token. `generated` counts its tokens, `cached_tokens` the prompt tokens that it found in
    the prefix cache when first admitted, `preemptions` how often it was preempted.

    `itl_ns` are gaps between consecutive tokens of one request, all requests pooled, each of which occurred
    `itl_count` times; only of tokens read after `warm_up_ns`. `batch_sizes[n]` counts the steps of n requests.
    `kv_blocks` is the size of the pool, all replicas together.
    """

    arrival_ns: Int64
    started_ns: Int64
    first_token_ns: Int64
    finished_ns: Int64
    prompt_tokens: Int64
    output_tokens: Int64
    generated: Int64
    cached_tokens: Int64
    preemptions: Int64
    priority: Int64
    replica: Int64
    itl_ns: Int64
    itl_count: Int64
    batch_sizes: Int64
    series: Series
    kv_blocks: int
    warm_up_ns: int
    total_ns: int
