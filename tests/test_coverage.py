"""Coverage: the split of the executed points, what is learned from one half, and whether intervals hold the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

from batchsim.intervals.groups import group_of
from batchsim.intervals.learned import NORMAL, learned
from calibration.coverage import judged, throughput_key, told
from calibration.executed import Figure, Point, figures_of, points
from calibration.widths import HELD, drifts, width

FOLDER = Path(__file__).parent.parent / "calibration" / "validation"
DRAWS = 8


@pytest.fixture(scope="module")
def closed() -> list[Point]:
    """The points whose requests are all there at the start, with graphs."""
    found = [point for point in points(FOLDER) if point.folder == "."]
    return [point for point in found if getattr(point.scenario, "cuda_graphs", False)]


def figure(error: float, offset: float, told: bool = True) -> Figure:
    """A throughput that is measured so far from the prediction, on the logarithmic scale."""
    return Figure(
        "point", "serving/closed", False, told, "sync", "throughput_tokens_per_s", 1000 * float(np.exp(error)), 1000.0,
        offset,
    )  # fmt: skip


def test_executed_points_of_every_kind_are_found() -> None:
    found = list(points(FOLDER))
    assert {point.scenario.kind for point in found} == {"serving", "dynamic", "training"}
    assert len(found) >= 150 and len({(point.folder, point.name) for point in found}) == len(found)
    assert all(point.measured for point in found)


def test_nothing_was_learned_from_a_point_that_is_held_out() -> None:
    found = list(points(FOLDER))
    names = {kind: {point.name for point in found if point.scenario.kind == kind and point.told} for kind in
             ("serving", "dynamic", "training")}  # fmt: skip
    for kind, fitted in learned().fitted_to.items():
        assert set(fitted) <= names[kind]
    held_out = [point for point in found if not point.told]
    assert 0.35 <= len(held_out) / len(found) <= 0.8


def test_intervals_hold_what_was_executed(closed: list[Point]) -> None:
    every = [judged(each, learned()) for point in closed for each in figures_of(point, learned(), DRAWS)]
    held_out = [each for each in every if not each.figure.told]
    assert len(held_out) > 100
    for chosen in (every, held_out):
        assert 0.85 <= np.mean([each.inside for each in chosen]) <= 0.97
    throughput = [each for each in every if each.figure.key == throughput_key(each.figure)]
    assert np.mean([each.inside for each in throughput]) >= 0.85
    # Not by being wide: on either side of the point less than a tenth of it.
    assert np.median([each.half for each in throughput]) < 0.1


def test_a_width_is_found_again() -> None:
    rng = np.random.default_rng(0)
    offsets = np.exp(rng.normal(-4, 0.7, 4000))
    errors = rng.normal(0, offsets)
    as_drawn = width([figure(float(error), float(off)) for error, off in zip(errors, offsets, strict=True)])
    assert as_drawn.spread == pytest.approx(norm.ppf((1 + HELD) / 2), rel=0.06) and as_drawn.floor < 0.01
    constant = width([figure(float(error), 1e-6) for error in rng.normal(0, 0.05, 4000)])
    assert constant.floor == pytest.approx(0.05 * norm.ppf((1 + HELD) / 2), rel=0.06)


def test_a_few_figures_do_not_decide_alone() -> None:
    few, many = ([figure(0.01, 0.001), figure(-0.01, 0.001)] * times for times in (1, 500))
    halves = [np.hypot(0.001 * found.spread, found.floor) for found in (width(few), width(many))]
    assert halves[0] > 1.2 * halves[1] and halves[1] == pytest.approx(0.01, rel=0.1)


def test_draws_count_no_less_than_they_tell() -> None:
    found = width([figure(0.02 * (-1) ** i, 0.001 + 0.1 * (i % 2)) for i in range(200)])
    assert found.spread == pytest.approx(NORMAL, rel=1e-3)


def test_drifts_are_how_far_stages_were_off(closed: list[Point]) -> None:
    point = replace(closed[0], facts={**closed[0].facts, "host_speed": 1.0})
    same = replace(point, measured=point.simulate(point.scenario, point.costs).results)
    assert set(drifts([same])["serving/closed"].values()) == {0.0}
    slower = {
        name: replace(result, stage_ms={stage: 1.1 * ms for stage, ms in result.stage_ms.items()})
        for name, result in same.measured.items()
    }
    found = drifts([replace(point, measured=slower)])["serving/closed"]
    # Four in five are off by no more than 1.28 standard deviations.
    for factor in ("decode", "prefill", "host", "copies"):
        assert found[factor] == pytest.approx(np.log(1.1) / norm.ppf(0.9), abs=1e-3)
    assert found["sync"] == found["async"] == pytest.approx(0, abs=1e-9)


def test_tables_tell_both_tails() -> None:
    every = [judged(figure(error, 0.01), learned()) for error in (-1.0, 0.0, 0.0, 1.0)]
    assert [each.inside for each in every] == [False, True, True, False]
    lines = list(told(every))
    row = next(line for line in lines if line.startswith("| tokens/s"))
    assert "50.0%" in row and row.count("25.0%") == 2
    assert group_of("throughput_tokens_per_s") == "throughput"
