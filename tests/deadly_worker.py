"""A process for points that dies at some of them: `python -m tests.deadly_worker DESCRIPTOR`, started by a sweep.

It notes in the file DEADLY_LOG each point that it begins, by max_batch_size; at those listed in DEADLY_ONCE it kills
itself the first time, at those of DEADLY_ALWAYS each time.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from batchsim.sweep import point, worker


def main() -> None:
    log, told = Path(os.environ["DEADLY_LOG"]), point.told

    def deadly(task: point.Task) -> bytes:
        size = str(task.fields["max_batch_size"])
        before = log.read_text().split()
        with log.open("a") as file:
            file.write(f"{size} ")
        once = size in os.environ["DEADLY_ONCE"].split() and size not in before
        if once or size in os.environ["DEADLY_ALWAYS"].split():
            os.kill(os.getpid(), signal.SIGKILL)
        return told(task)

    point.told = deadly
    worker.main(int(sys.argv[1]))


if __name__ == "__main__":
    main()
