"""The data of compiled dynamic batching, beside that of `batchsim.iteration.state`.

Compiled functions name it `q` (the queue), `rq` (the requests) and `rows` (the batches, as `batchsim.answered.BATCH`).
"""

from __future__ import annotations

import numpy as np

from batchsim.iteration.state import integers

# Where a request is: yet to come; in the queue, in time or late; out of it.
COMING, IN_TIME, LATE, LEFT = range(4)

# `batchsim.answered.REQUEST`, and what the queue is made of: the next of the same class, and which class that is.
REQUEST = np.dtype(
    [
        ("arrival_ns", np.int64), ("entered_ns", np.int64), ("left_ns", np.int64), ("tokens", np.int32),
        ("priority", np.int32), ("batch", np.int32), ("link", np.int32), ("kind", np.int16), ("state", np.int8),
        ("outcome", np.int8),
    ],
    align=True,
)  # fmt: skip

QUEUE = np.dtype(
    integers(
        # As `batchsim.batching.dynamic.DynamicBatcher` has them; what is not asked for is NEVER.
        "max_batch_size max_queue_delay_ns queue_timeout_ns drops max_queue_size max_priority_wait_ns "
        "length_bucket max_concurrency closed waiting in_flight held room_ns batches arrivals served_late finished "
        # The next request to come, and the first that may wait in time or late: all before those do not.
        "next first first_late late lost "
        # Where tables stand among the integers: preferred sizes, and the first and last of each class.
        "preferred_at preferred heads_at tails_at classes "
        # A table of service times, and the bins that batches draw.
        "times_at bins draws_at draws draws_end turns"
    ),
    align=True,
)
