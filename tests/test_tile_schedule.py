"""The third schedule: what the tile level saves comes off the device's step, and nothing else changes."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from batchsim import engine
from batchsim.engine import simulate
from batchsim.errors import InputError
from batchsim.model import MODELS
from batchsim.profile import load_profile
from batchsim.result import Run
from batchsim.scenario import Scenario, parse
from batchsim.tiles.level import NOTHING_SAVED, Choice, Saved, TileLevel
from batchsim.tiles.policy import prove
from batchsim.tiles.profile import LibraryCurve, TileProfile, parse_tile_profile, tile_profile_of
from tests.tile_profiles import tile_profile_data

PROFILE = parse_tile_profile(json.dumps(tile_profile_data()), "made-up")
TEXT = """
kind: serving
name: s
model: llama-3.1-8b
profile: h200-llama-3.1-8b
schedules: [async, tile]
jitter: false
max_num_seqs: 32
workload: {kind: fixed, num_prompts: 32, input_len: 64, output_len: 40}
"""


def run(monkeypatch: pytest.MonkeyPatch, tiles: TileLevel | None) -> tuple[Scenario, Run]:
    monkeypatch.setattr(engine, "tile_level_of", lambda *_: tiles)
    scenario = parse(TEXT)
    return scenario, simulate(scenario, load_profile(scenario.profile))


def test_without_savings_tile_is_async_to_the_nanosecond(monkeypatch: pytest.MonkeyPatch) -> None:
    _, result = run(monkeypatch, None)
    same = [replace(each, schedule="either", warnings=()) for each in result.results.values()]
    assert same[0] == same[1]
    assert any("tile" in warning for warning in result.results["tile"].warnings)


class Saving(TileLevel):
    """A tile level that saves the same at every batch."""

    def __init__(self, ns: int) -> None:
        super().__init__(MODELS["llama-3.1-8b"], PROFILE)
        self.ns = ns

    def saved(self, rows: int) -> Saved:
        return Saved(self.ns, 0)


def test_what_is_saved_comes_off_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = 400_000
    _, result = run(monkeypatch, Saving(saved))
    slow, fast = result.results["async"], result.results["tile"]
    steps = slow.counts["steps"]
    assert fast.counts == slow.counts
    # The device bounds this scenario but for the first step's host work, which both pay.
    assert (slow.total_s - fast.total_s) * 1e9 == pytest.approx(saved * steps, rel=0.02)
    assert fast.throughput > slow.throughput


def test_no_choice_where_the_library_is_unknown_or_faster() -> None:
    shape = MODELS["llama-3.1-8b"]
    assert TileLevel(shape, PROFILE).saved(512) == NOTHING_SAVED
    assert TileLevel(shape, with_library(PROFILE, 1e3)).choice(512) is None


def test_the_choice_is_proven_and_beats_a_slow_library() -> None:
    level = TileLevel(MODELS["llama-3.1-8b"], with_library(PROFILE, 1e9))
    choice = level.choice(512)
    assert isinstance(choice, Choice)
    prove(choice.policy)
    assert choice.time_ns < choice.library_ns
    assert level.saved(512).ns == (choice.library_ns - choice.time_ns) * 32
    assert level.choice(512) is choice  # simulated once


def with_library(profile: TileProfile, ns: float) -> TileProfile:
    curve = LibraryCurve(chain="gated_mlp", hidden=4096, inner=14336, rows=[512], ns=[ns])
    return profile.model_copy(update={"library": [curve]})


def test_the_shipped_profile_is_found_by_its_device() -> None:
    profile = tile_profile_of("NVIDIA H200")
    assert profile is not None and profile.name == "h200-tiles"
    assert tile_profile_of("cpu") is None


def test_a_profile_without_this_models_mlp_is_said_to_know_nothing() -> None:
    scenario = parse(TEXT).model_copy(update={"tile_profile": "v100-cusync"})
    result = simulate(scenario, load_profile(scenario.profile))
    assert any("knows no MLP" in warning for warning in result.results["tile"].warnings)
    assert not result.results["async"].warnings


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (("costs", "gemm 128x256x64", "step_ns"), -1.0, "gemm 128x256x64"),
        (("device", "sms"), 0, "multiprocessor"),
        (("tilings", 0, "tiling", "cost"), "nothing", "nothing"),
    ],
)
def test_an_unsound_tile_profile_is_refused(place: tuple[Any, ...], value: object, told: str) -> None:
    data = tile_profile_data()
    *parents, last = place
    at: Any = data
    for key in parents:
        at = at[key]
    at[last] = value
    with pytest.raises(InputError, match=told):
        parse_tile_profile(json.dumps(data), "x.json")
