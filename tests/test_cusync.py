"""The model of the multiprocessors against published times on a V100: from baselines alone to what policies gain."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from typer.testing import CliRunner

from batchsim.tiles.graph import Chain
from batchsim.tiles.policy import compile_policy
from batchsim.tiles.sm import TileDevice, simulate
from batchsim.yaml_loader import load as load_yaml
from calibration.cusync import (
    GRID,
    PREDICTED,
    PUBLISHED,
    V100,
    Point,
    app,
    fitted_device,
    gains,
    hardware_order,
    median_error,
    predictions,
    published,
    step_ns,
    wrong_signs,
)

COMMITTED: dict[str, Any] = json.loads(PREDICTED.read_text(encoding="utf-8"))


@cache
def points() -> tuple[Point, ...]:
    return predictions(fitted_device())


def test_gains_are_what_the_published_times_say() -> None:
    for entry in load_yaml(PUBLISHED).data["rows"]:
        assert entry["gemm1_us"] + entry["gemm2_us"] == pytest.approx(entry["baseline_us"], abs=0.03)
        for policy in {"rowsync", "tilesync"} & entry.keys():
            gain = 100 * (1 - entry[policy]["us"] / entry["baseline_us"])
            assert gain == pytest.approx(entry[policy]["improvement_pct"], abs=0.02)


def test_grids_follow_from_shapes_and_tiles() -> None:
    for row in published():
        for kernel, kind in zip(row.chain().kernels, row.kinds, strict=True):
            assert kernel.grid == kind.grid


def test_the_median_error_of_the_gain_is_at_most_three_points() -> None:
    assert len(points()) == 71
    assert median_error(points()) <= 3


def test_the_sign_is_right_wherever_more_than_three_percent_were_measured() -> None:
    assert sum(abs(point.measured) > 3 for point in points()) == 40
    assert wrong_signs(points()) == []


def test_one_set_of_parameters_serves_all_rows_and_two_of_them_are_fitted() -> None:
    device = fitted_device()
    assert set(COMMITTED["fitted"]) == set(GRID) == {"overlap", "wait_ns"}
    assert replace(device, **{key: getattr(V100, key) for key in GRID}) == V100
    assert all(getattr(device, key) in GRID[key] for key in GRID)


def test_the_committed_table_is_what_is_predicted_now() -> None:
    told = [Point(**point) for point in COMMITTED["points"]]
    for point, was in zip(points(), told, strict=True):
        assert point._replace(predicted=0.0) == was._replace(predicted=0.0)
        assert point.predicted == pytest.approx(was.predicted, abs=0.01)


@pytest.mark.parametrize("held_out", COMMITTED["held_out"], ids=lambda held_out: held_out["model"])
def test_rows_that_the_fit_has_not_seen(held_out: dict[str, Any]) -> None:
    """Fitted on the other model's rows; small gains do not always have the right sign then, as the file says."""
    device = replace(V100, **held_out["fitted_on_the_other"])
    unseen = [point for row in published() if row.model == held_out["model"] for point in gains(row, device)]
    assert median_error(unseen) <= 3
    assert median_error(unseen) == pytest.approx(held_out["median_error"], abs=0.01)
    assert len(wrong_signs(unseen)) == held_out["wrong_signs"]


def test_kernels_by_themselves_take_what_was_published() -> None:
    device: TileDevice = fitted_device()
    for row in published()[::5]:
        for kernel, kind, us in zip(row.chain().kernels, row.kinds, row.us, strict=True):
            cost = kind.cost(step_ns(kernel, kind, us, device))
            alone = hardware_order(compile_policy(Chain("alone", (kernel,))))
            total_ns = simulate(alone, {kernel.cost: cost}, device).total_ns + device.launch_gap_ns
            assert total_ns == pytest.approx(us * 1e3, rel=0.01)


def test_the_table_has_a_line_for_every_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibration.cusync.predictions", lambda _: points())
    result = CliRunner().invoke(app, ["table"])
    assert result.exit_code == 0
    assert result.output.count("rowsync") + result.output.count("tilesync") == 71
    assert "wrong sign" in result.output
