"""Points on processes of this machine. A process that dies takes nothing with it but the point that it was at."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Generator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TypeAlias

from batchsim.errors import RunError
from batchsim.sweep.point import PASSING, Task, failed, told

# The name of a point, its file's content, and whether that is for keeps: not of one that the machine failed.
Done: TypeAlias = tuple[str, bytes, bool]

WORKER = "batchsim.sweep.worker"
DEATHS = 2
DIED = f"the process that ran it died {DEATHS} times (no memory left, perhaps); a sweep that goes on tries again"
# One thread each: there are as many processes as cores.
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
# A process has the next point at hand when it is done with one, unless others would have none then.
_AHEAD = 2
# So many processes may be killed before they have begun; and how long one that is dead has to be gone, seconds.
_STILLBORN, _PATIENCE_S = 16, 5.0


class Fallen:
    """How often each point's process has died."""

    def __init__(self) -> None:
        self._deaths: Counter[str] = Counter()

    def again(self, task: Task) -> Done | None:
        """Note a death. None: the point is to be run again; else what is known of it."""
        self._deaths[task.hash] += 1
        return (task.hash, failed(task, DIED), False) if self._deaths[task.hash] >= DEATHS else None


class _Worker:
    """A process, and the tasks that it was given and has not answered, the one that it is at first."""

    def __init__(self) -> None:
        self.tasks: deque[Task] = deque()
        self.ready = False
        self.connection: Connection
        self.connection, theirs = Pipe()
        here = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
        with theirs:
            self._process = subprocess.Popen(
                # -P: the code is that of the process that started it, whatever lies in the working directory.
                [sys.executable, "-P", "-m", WORKER, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=os.environ | THREADS | {"PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is for the process that started it, which then ends it
            )

    def give(self, task: Task) -> None:
        """Of a process that is dead the next answer tells."""
        self.tasks.append(task)
        try:
            self.connection.send(task)
        except OSError:
            return

    def answer(self) -> tuple[str, bytes] | None:
        """What it says next; None: that it is there.

        Raises:
            EOFError, OSError: it is dead.
        """
        found: tuple[str, bytes] | None = self.connection.recv()
        if found is None:
            self.ready = True
        else:
            self.tasks.popleft()
        return found

    def end(self, patience_s: float = 0.0) -> int:
        """Kill it, unless it ends by itself in so many seconds; returns its exit status."""
        self.connection.close()
        try:
            return self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def on_processes(tasks: Sequence[Task], workers: int) -> Generator[Done]:
    """Run the tasks on so many processes, and tell each as it is done. A point whose process dies is run again, once.

    Raises:
        RunError: processes end before they have begun.
    """
    todo, fallen, stillborn = deque(tasks), Fallen(), 0
    pool = [_Worker() for _ in range(min(workers, len(tasks)))]
    try:
        while todo or any(worker.tasks for worker in pool):
            for worker in pool:
                while todo and len(worker.tasks) < (_AHEAD if len(todo) > len(pool) else 1):
                    worker.give(todo.popleft())
            ready = wait([worker.connection for worker in pool])
            for worker in [worker for worker in pool if worker.connection in ready]:
                try:
                    done = worker.answer()
                except (EOFError, OSError):
                    pool.remove(worker)
                    status = worker.end(_PATIENCE_S)
                    if not worker.ready:  # no point is to blame: it was killed, or cannot run here
                        stillborn += 1
                        if status >= 0 or stillborn > _STILLBORN:
                            reason = f"a process for points ended before it began (exit status {status})"
                            raise RunError(reason) from None
                    elif worker.tasks and (lost := fallen.again(worker.tasks[0])) is not None:
                        worker.tasks.popleft()
                        yield lost
                    todo.extendleft(reversed(worker.tasks))
                    if todo:
                        pool.append(_Worker())
                else:
                    if done is not None:
                        yield (*done, True)
    finally:
        for worker in pool:
            worker.end()


def in_this_process(tasks: Sequence[Task]) -> Generator[Done]:
    """Run the tasks here, one after another."""
    for task in tasks:
        try:
            done = task.hash, told(task), True
        except PASSING as error:
            reason = f"{type(error).__name__}: {error}".removesuffix(": ")
            done = task.hash, failed(task, f"{reason}; a sweep that goes on tries again"), False
        yield done
