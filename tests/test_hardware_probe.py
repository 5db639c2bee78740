"""The probe of parts of a device: all that the law is fitted to is timed, and is read again as it was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from batchsim.errors import InputError
from batchsim.files import write_json
from batchsim.model import MODELS
from calibration.hardware.fit import TIMINGS, Timings
from calibration.hardware.fit import app as fit_app
from calibration.hardware.fit_tiles import WHOLE
from calibration.hardware.probe import CPU, CUDA, Sizes, _ended_well, app, cells_of, parts_of
from calibration.hardware.probe_timing import launched, on_part, shapes_of

NAME = "nvjet_sm90_tst_64x8_64x16_4x1_v_bz_TNT"


def products_of(sizes: Sizes, rows: tuple[int, ...]) -> set[tuple[int, int, int]]:
    return {
        (columns, depth, count)
        for model in sizes.models
        for name, (columns, depth) in shapes_of(MODELS[model]).items()
        for count in rows
        if name != "head" or count <= sizes.head_rows
    }


@pytest.fixture(scope="module")
def probed() -> dict[str, Any]:
    """What the probe finds of the toy model on the CPU."""
    found: dict[str, Any] = json.loads(json.dumps(on_part(CPU, "cpu", 0)))
    return found


class TestMeasuring:
    def test_every_product_and_forward_is_timed_once(self, probed: dict[str, Any]) -> None:
        found = [(entry["n"], entry["k"], entry["rows"]) for entry in probed["gemm"]]
        assert len(found) == len(set(found))
        assert set(found) == products_of(CPU, CPU.rows)
        assert [cell["key"] for cell in probed["cells"]["tiny"]] == [cell.key for cell in cells_of(CPU)]
        assert all(entry["us"] > 0 for entry in probed["gemm"])
        assert all(cell["median_ns"] > 0 for cell in probed["cells"]["tiny"])

    def test_a_model_s_products_are_its_layers_weights(self) -> None:
        for model in CUDA.models:
            shape, found = MODELS[model], shapes_of(MODELS[model])
            layer = sum(columns * depth for name, (columns, depth) in found.items() if name != "head")
            assert layer + 2 * shape.hidden_size == shape.layer_parameters

    def test_what_is_measured_is_what_was_fitted_to(self) -> None:
        content = json.loads(TIMINGS.read_text(encoding="utf-8"))
        timings = Timings.read(TIMINGS)
        for forwards in timings.forwards.values():
            assert [(model, cell) for model, cell, _ in forwards] == [
                (model, cell) for model in CUDA.models for cell in cells_of(CUDA)
            ]
        graphs, profiled = products_of(CUDA, CUDA.rows), products_of(CUDA, CUDA.profiled)
        assert set(timings.plans) <= profiled
        for sms, entries in content["products_us"].items():
            found = {(n, k, rows) for n, k, rows, _ in entries}
            assert found in (graphs, graphs | profiled), sms

    def test_a_kernel_is_of_the_mark_in_which_it_was_launched(self) -> None:
        def event(cat: str, name: str, ts: float, dur: float = 1.0, **args: object) -> dict[str, Any]:
            return {"cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}

        events = [
            event("kernel", "late", 50.0, correlation=2),  # began after the next mark had
            event("kernel", "early", 13.0, correlation=1),
            event("kernel", "other", 60.0, correlation=3),
            event("kernel", "unknown", 61.0, correlation=4),
            event("user_annotation", "rows64", 10.0, 10.0),
            event("user_annotation", "rows128", 40.0, 10.0),
            event("user_annotation", "else", 25.0, 10.0),
            event("gpu_user_annotation", "rows64", 49.0, 10.0),
            event("cuda_runtime", "cudaLaunchKernel", 12.0, correlation=1),
            event("cuda_driver", "cuLaunchKernelEx", 19.0, correlation=2),
            event("cuda_runtime", "cudaLaunchKernel", 30.0, correlation=3),
            {"ph": "M", "name": "process_name"},
        ]
        assert [(rows, found["name"]) for rows, found in launched(events)] == [(64, "late"), (64, "early")]


class TestKeeping:
    def test_what_was_measured_is_read_again(self, probed: dict[str, Any], tmp_path: Path) -> None:
        alone = {"model": "tiny", "n": 64, "k": 64, "rows": 3, "kernel": NAME, "grid": [4, 1, 1]}
        both = [{**alone, "us": us} for us in (5.0, 4.0)] + [{**alone, "rows": 4, "us": 1.0}]
        for sms, kernels in ((WHOLE, both), (48, [])):
            write_json(tmp_path / f"c{sms}.json", probed | {"info": {"stream": sms}, "kernels": kernels})
        kept = tmp_path / "kept.json"
        told = CliRunner().invoke(fit_app, ["keep", str(tmp_path), "--out", str(kept)], catch_exceptions=False)
        assert told.exit_code == 0
        assert json.loads(kept.read_text(encoding="utf-8"))["provenance"] == probed["provenance"]
        timings = Timings.read(kept)
        assert set(timings.plans) == {(64, 64, 3), (64, 64, 4)}
        measured = {(entry["n"], entry["k"], entry["rows"]): entry["us"] for entry in probed["gemm"]}
        for key, us in measured.items():
            assert [sms for sms, _ in timings.products[key]] == [48, WHOLE]
            assert [kept_us for _, kept_us in timings.products[key]] == pytest.approx([us, us], abs=1e-3)
        ((sms, us),) = timings.products[64, 64, 3]  # in the profiler alone, the faster one
        assert sms == WHOLE and 4.0 < us < 5.9
        for forwards in timings.forwards.values():
            assert [cell for _, cell, _ in forwards] == cells_of(CPU)


class TestCommand:
    def test_parts_already_there_are_kept(self, tmp_path: Path) -> None:
        (tmp_path / "c0.json").write_text("{}", encoding="utf-8")
        told = CliRunner().invoke(app, ["measure", "--device", "cpu", "--out", str(tmp_path)])
        assert told.exit_code == 0
        assert (tmp_path / "c0.json").read_text(encoding="utf-8") == "{}"

    @pytest.mark.parametrize(
        ("device", "sms"),
        [("cuda", "24,x"), ("cuda", "0"), ("cuda", "24,24"), ("cuda", "-8"), ("cpu", "2"), ("tpu", "")],
    )
    def test_what_is_no_part_is_refused(self, device: str, sms: str) -> None:
        with pytest.raises(InputError, match=f"found {sms or device}, wanted"):
            parts_of(device, sms)

    def test_parts_are_numbers(self) -> None:
        assert parts_of("cuda", "24,132") == [24, 132]
        assert parts_of("cuda", "") == parts_of("cpu", "") == [0]

    @pytest.mark.parametrize("code", ["raise SystemExit(3)", "import time; time.sleep(60)"])
    def test_a_part_that_fails_or_hangs_did_not_end_well(self, code: str) -> None:
        hangs = "sleep" in code
        assert not _ended_well([sys.executable, "-S", "-c", code], -5 if hangs else 60)
