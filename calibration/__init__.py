"""Everything that touches a GPU: measuring it, running scenarios on it, comparing with predictions.

Imports batchsim; batchsim never imports this package except at its command line.
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from calibration.recording import Recording


def record(
    path: str | PathLike[str], *, warmup: int = 10, timed: int = 40, traced: int = 8, shapes: bool = False
) -> Recording:
    """Record a loop of yours for `batchsim learn`: a profiler trace and the untraced step time, in one file.

        with calibration.record("run.trace.json.gz") as recording:
            for batch in loop:  # 60 steps or more
                recording.step()  # at the start of each step; or `for batch in recording.steps(loop)`
                with recording.phase("prepare"):  # optional
                    ...

    See `calibration.recording.Recording` for the order of steps, and for what the file holds. PyTorch is imported at
    the call, not before.
    """
    from calibration.recording import Recording

    return Recording(path, warmup=warmup, timed=timed, traced=traced, shapes=shapes)
