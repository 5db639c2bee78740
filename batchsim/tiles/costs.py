"""What tiles cost, and what the device offers them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TileCost:
    """Measured costs of one kind of tile, named by `Kernel.cost`.

    step_ns: one iteration of the main loop, alone on its multiprocessor, nothing contended for.
    start_ns: from the slot to the first iteration (dispatch or ticket, filling the pipeline).
    end_ns: the epilogue, writing the output.
    row_bytes, col_bytes: what an iteration loads of the row operand and of the column operand (the weights).
    reduce_ns: adding one share of a split contraction to its tile; shares of a tile do so one after the other.
    share: how much of its multiprocessor's throughput a block takes when it is alone there. Blocks that run together
        slow each other down as far as their shares exceed 1.
    """

    step_ns: float
    start_ns: float = 0.0
    end_ns: float = 0.0
    row_bytes: float = 0.0
    col_bytes: float = 0.0
    share: float = 1.0
    reduce_ns: float = 0.0


@dataclass(frozen=True, slots=True)
class TileDevice:
    """Multiprocessors, the memory they share, and the cost of telling each other. A bandwidth of 0: unlimited.

    l2_bytes: how much of what tiles load stays at hand for others. Tiles of a row (a column) load their row (column)
        operand once for all of them if they begin before it is forgotten; 0: whenever they begin.
    launch_gap_ns: from the end of a kernel to the first block of the next one of the same stream.
    post_ns: a fence and an addition to a semaphore, after the epilogue.
    wait_ns: a poll, for each entry that a tile waits for, be it satisfied or not; loads go on meanwhile.
    refill_ns: from the poll that saw the semaphore full to a main loop in full swing again.
    wait_kernel_ns: how long after the first block of a kernel those of its consumer may follow.
    fixup_ns: added to the end of a tile that Stream-K cuts.
    overlap: how well loads hide behind arithmetic: an iteration takes the norm of this order of the two times; 0: the
        longer of the two, as if it were infinite.
    spread: standard deviation of the tiles' times, as a share of them; `replication` numbers the draws.
    """

    name: str
    sms: int
    dram_bytes_per_ns: float = 0.0
    l2_bytes_per_ns: float = 0.0
    l2_bytes: float = 0.0
    launch_gap_ns: float = 0.0
    post_ns: float = 0.0
    wait_ns: float = 0.0
    refill_ns: float = 0.0
    wait_kernel_ns: float = 0.0
    fixup_ns: float = 0.0
    overlap: float = 0.0
    spread: float = 0.0
    replication: int = 0
