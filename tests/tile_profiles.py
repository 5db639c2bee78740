"""A made-up profile of tiles: few multiprocessors, and costs at which synchronising them may pay or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from batchsim.tiles.profile import TileProfile, parse_tile_profile

SMS = 12


def tile_profile_data() -> dict[str, Any]:
    def tiling(kind: str, rows: int, cols: int, depth: int, cost: str, occupancy: int = 1) -> dict[str, Any]:
        sides = {"rows": rows, "cols": cols, "depth": depth, "occupancy": occupancy, "cost": cost}
        return {"kind": kind, "tiling": sides}

    return {
        "schema_version": 1,
        "kind": "tile_profile",
        "name": "made-up",
        "provenance": {"device": "none"},
        "device": {"name": "made-up device", "sms": SMS, "launch_gap_ns": 1000.0, "post_ns": 400.0, "wait_ns": 50.0},
        "costs": {
            "gemm 128x256x64": {"step_ns": 600.0, "start_ns": 900.0, "end_ns": 1100.0},
            "gemm 128x128x64": {"step_ns": 340.0, "start_ns": 900.0, "end_ns": 900.0},
            "conv 128x64x64": {"step_ns": 300.0, "start_ns": 900.0, "end_ns": 700.0},
            "attention 128x64": {"step_ns": 700.0, "start_ns": 900.0, "end_ns": 700.0},
        },
        "tilings": [
            tiling("gemm", 128, 256, 64, "gemm 128x256x64"),
            tiling("gemm", 128, 128, 64, "gemm 128x128x64"),
            tiling("gated", 128, 256, 64, "gemm 128x256x64"),
            tiling("conv", 128, 64, 64, "conv 128x64x64", occupancy=2),
            tiling("attention", 128, 128, 64, "attention 128x64"),
        ],
    }


def tile_profile() -> TileProfile:
    return parse_tile_profile(json.dumps(tile_profile_data()), "made-up.json")


def write_tile_profile(folder: Path) -> Path:
    path = folder / "made-up.json"
    path.write_text(json.dumps(tile_profile_data()))
    return path
