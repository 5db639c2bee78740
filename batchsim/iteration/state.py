"""The compiled engine's data: records and two flat arrays, shared between compiled code and Python as they are.

Compiled functions name them `s` (a replica), `c` (the settings), `rq` (the requests), `f` (a batch in flight), `m` and
`x` (the flat arrays of integers and of floats). Where a table begins in a flat array stands in a field `..._at`. Few
and flat, because each array that compiled functions hand on makes them slower to compile and to call.
"""

from __future__ import annotations

import numpy as np

from batchsim.served import MAX_MOMENTS

# Draws, one stream each.
NAMES = (
    "schedule", "build_inputs", "copy_in", "launch", "copy_out", "record", "stream_wait", "wait", "update",
    "kernel_launch", "decode", "prefill",
)  # fmt: skip
# Beside the host phases and the two kinds of forward, what idle time and stage times are told apart by.
STAGES = (*NAMES, "device_copy_in", "device_copy_out", "launch_latency", "wake_up", "no_requests")
# As numpy's integers: for each Python integer that it is called with, a compiled function would be compiled anew.
(
    SCHEDULE, BUILD_INPUTS, COPY_IN, LAUNCH, COPY_OUT, RECORD, STREAM_WAIT, WAIT, UPDATE,
    KERNEL_LAUNCH, DECODE, PREFILL, DEVICE_COPY_IN, DEVICE_COPY_OUT, LAUNCH_LATENCY, WAKE_UP, NO_REQUESTS,
) = (np.int64(stage) for stage in range(len(STAGES)))  # fmt: skip
# How often a step draws these at most; all others once.
DRAWS_A_STEP = {"record": 3, "stream_wait": 2}

# Why the compiled engine returned.
DONE, PAUSED, QUOTA = (np.int64(reason) for reason in range(3))
# At which operation a replica stands.
AT_SCHEDULE, AT_UPDATE, AT_END, AT_IDLE = range(4)
NEVER = np.int64(np.iinfo(np.int64).max)
# The state of a request.
COMING, WAITING, PREFILLING, DECODING, FINISHED = range(5)

RECENT = 128  # host spans remembered, a power of two: more than three steps have
COPIES = 8  # copies remembered, each way
LOG_COLUMNS = 6


def integers(names: str) -> list[tuple[str, type]]:
    """Fields of a record, each a 64-bit integer."""
    return [(name, np.int64) for name in names.split()]


# A request: what is asked for, what became of it, and while it runs what its tokens so far follow from: tokens to
# prefill first and how many of these are computed, the step of its first decode and that of its last token, the time of
# its latest token where no step tells it.
REQUEST = np.dtype(
    integers(
        "arrival_ns prompt_tokens output_tokens priority rank hash_start hashes "
        "started_ns first_token_ns finished_ns generated cached_tokens preemptions replica "
        "prefill_len computed decodes_from finish_step last_token_ns registered state"
    ),
    align=True,
)

REPLICA = np.dtype(
    [
        # Where the loop stands; `unread` is the step of the batch in flight whose results come next.
        *integers("number at now_ns unread more quota"),
        # The batcher: the next request, and what runs and waits.
        *integers("next stop stride step running decoding partial kv_base next_finish waiting used accepted finished"),
        *integers("output_tokens wasted_tokens preempted late"),
        # The batch just formed.
        *integers("tokens prefill_tokens kv_tokens seqs admitted pairs depth"),
        # Of dynamic batching: its time by a table, and since when, until when and in which turn an instance waits.
        *integers("service_ns idle_from wake_ns turn"),
        # The streams: when they are reached, and their last command ended.
        *integers("reached_ns end_ns in_reached_ns in_end_ns out_reached_ns out_end_ns"),
        # Figures.
        *integers("device_end_ns last_update_ns waited_ns busy_ns gap_ns updates decisions events"),
        *integers("recent_first recent_last moments moment_stride log_step"),
        # Filled parts of the buffers that the caller empties.
        *integers("steps extras tokens_kept logged"),
        # The cache of prompts: blocks without users, the one that was left first and last, and free entries.
        *integers("unused oldest newest spare slots_mask"),
        *integers("queue_at running_at needs_at finals_at late_at slots_at batch_sizes_at extrapolated_at"),
        *integers("steps_at weights_at extras_at tokens_at log_at"),
        ("positions", np.int64, (len(NAMES),)),
        ("stage_ns", np.int64, (len(STAGES),)),
        ("stage_steps", np.int64, (len(STAGES),)),
        ("idle_ns", np.int64, (len(STAGES),)),
        ("recent", np.int64, (RECENT, 4)),
        ("copies", np.int64, (2, COPIES, 2)),
        ("gaps", np.int64, (32, 2)),
        ("series", np.int64, (MAX_MOMENTS, 4)),
    ],
    align=True,
)

# One of the two batches in flight.
FLIGHT = np.dtype(
    integers(
        "step seqs tokens prefill_tokens admitted decodes wasted finals done_ns start_ns end_ns gap_ns "
        "launch_start_ns launched_ns launch_end_ns "
        "batch late decided_ns"  # of dynamic batching
    ),
    align=True,
)

# What is the same for all replicas and never changes, but for the two fields of the router.
SETTINGS = np.dtype(
    [
        *integers("asynchronous max_num_seqs max_num_batched_tokens block_size num_kv_blocks chunked_prefill reserve"),
        *integers("prefix_caching hash_tokens max_concurrency closed warm_up_ns router next_routed routed_ns"),
        *integers("keep_tokens tokens_size extras_size log_steps log_from_ns log_rows"),
        *integers("launch_ns copy_ns event_ns event_gap_ns wake_up_ns copy_in_device_ns copy_out_device_ns"),
        *integers(
            "overlaps graphs table tile first layers per_layer last split_rows measured_seqs curves prefill_points"
        ),
        *integers("hash_ids_at curve_of_at curve_sizes_at curve_starts_at curve_kv_at prefill_tokens_at"),
        *integers("beyond_ns_at curve_ns_at prefill_ns_at"),
        *[
            (name, np.float64)
            for name in ["scale", "eager_factor", "outer_share", "pair_ns", "depth_ns", "mixed_ns", "row_ns", "kv_ns"]
        ],
        *[(f"copy_{way}_ns", np.float64) for way in ("in_device_seq", "in_device_token", "out_device_seq")],
        ("phases", np.float64, (len(NAMES), 5)),
    ],
    align=True,
)
