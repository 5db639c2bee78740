"""Tile-synchronised kernels under asynchronous batching."""

from batchsim.operations import Program
from batchsim.schedules.async_ import async_


def tile() -> Program:
    """Asynchronous batching; within a forward, tiles of dependent kernels wait for tiles, not kernels for kernels."""
    return async_(kernels="tile")
