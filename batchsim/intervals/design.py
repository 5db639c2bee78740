"""Which way each factor is off in each draw: signs of a two-level orthogonal design.

A figure's variance by several factors is the sum of what each of them adds. A design whose columns are orthogonal
finds that sum from as many runs as it has rows, without the noise that as many independent draws would have (Plackett
and Burman 1946); blocks of eight rows hold seven factors. Every second block is the mirror image of the one before, so
that together they tell a slope from a curvature.
"""

from __future__ import annotations

from zlib import crc32

import numpy as np
import numpy.typing as npt

BLOCK = 8
MOST_FACTORS = BLOCK - 1


def signs(draws: int, factors: int, *, seed: int, replication: int) -> npt.NDArray[np.float64]:
    """(draws, factors): -1 or 1, from the stream `SeedSequence(seed, spawn_key=(replication, crc32(b"intervals")))`.

    Every whole block of `BLOCK` rows is orthogonal; more draws leave those before them as they are.
    """
    rng = np.random.Generator(
        np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(replication, crc32(b"intervals"))))
    )
    columns = _hadamard()[:, 1:]
    blocks: list[npt.NDArray[np.float64]] = []
    while BLOCK * len(blocks) < draws:
        if len(blocks) % 2:
            blocks.append(-blocks[-1])
            continue
        order, flips = rng.permutation(MOST_FACTORS), rng.choice((-1.0, 1.0), MOST_FACTORS)
        rows = rng.permutation(BLOCK)
        blocks.append((columns[:, order] * flips)[rows])
    return np.concatenate(blocks or [np.empty((0, MOST_FACTORS))])[:draws, :factors]


def _hadamard() -> npt.NDArray[np.float64]:
    """Sylvester's matrix of order `BLOCK`: its first column is all ones, and all columns are orthogonal."""
    matrix = np.ones((1, 1))
    while len(matrix) < BLOCK:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
