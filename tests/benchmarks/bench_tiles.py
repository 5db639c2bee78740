"""How fast the tile level is, on one core: `make bench` prints the table. Nothing here fails for being slow."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median

import pytest
from rich.console import Console
from rich.table import Table

from batchsim.tiles.compare import rank
from batchsim.tiles.graph import Chain
from batchsim.tiles.policy import policies
from batchsim.tiles.profile import TileProfile, load_tile_profile
from batchsim.tiles.shapes import mlp
from batchsim.tiles.sm import simulate

REPEATS = 7
LAYERS = 96


def gpt3_pair(profile: TileProfile) -> Chain:
    """GPT-3's MLP at M = 2048, one of eight devices' share."""
    tiling = next(tiling for tiling in profile.tilings_of("gemm") if (tiling.rows, tiling.cols) == (128, 256))
    return mlp(2048, 12288, 6144, tiling, tiling)


def timed_ms(profile: TileProfile, kind: str, turn: int) -> float:
    """Compiling, proving and simulating one policy, on a device that no run is remembered of."""
    chain, device = gpt3_pair(profile), replace(profile.device, name=f"{kind} {turn}")
    start = time.perf_counter()
    for policy in policies(chain, only={kind}):
        if kind == policy.name:
            simulate(policy, profile.costs, device)
    return (time.perf_counter() - start) * 1e3


def test_one_policy_and_a_whole_forward(capsys: pytest.CaptureFixture[str]) -> None:
    profile = load_tile_profile("h200-tiles")
    table = Table("what", "ms")
    for kind in ("StreamSync", "RowSync", "TileSync"):
        table.add_row(kind, f"{median(timed_ms(profile, kind, turn) for turn in range(REPEATS)):.0f}")
    chain = gpt3_pair(profile)
    device = replace(profile.device, name="all policies")
    start = time.perf_counter()
    rank(chain, profile.costs, device)
    once = time.perf_counter()
    for _ in range(LAYERS - 1):
        rank(chain, profile.costs, device)
    table.add_row("all policies ranked", f"{(once - start) * 1e3:.0f}")
    table.add_row(f"the same for {LAYERS - 1} more layers", f"{(time.perf_counter() - once) * 1e3:.1f}")
    with capsys.disabled():
        Console(width=120).print("\nGPT-3 MLP pair, M = 2048, 1,152 tiles", table)
