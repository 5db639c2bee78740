"""A process that runs points: `python -m batchsim.sweep.worker DESCRIPTOR`, its connection to the one that started it.

It is told tasks and answers each with its name and the bytes of its file, in order, until the connection is closed; the
first answer, None, says that it is there.
"""

from __future__ import annotations

import sys
from multiprocessing.connection import Connection


def main(descriptor: int) -> None:
    """Answer tasks until there is nobody to tell."""
    from batchsim.sweep.point import told

    connection: Connection = Connection(descriptor)
    try:
        connection.send(None)
        while True:
            task = connection.recv()
            connection.send((task.hash, told(task)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


if __name__ == "__main__":
    main(int(sys.argv[1]))
