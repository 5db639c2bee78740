"""Running sweeps: every engine gives the same bytes, and nothing that dies on the way changes them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from batchsim.cli import app
from batchsim.errors import InputError, RunError
from batchsim.evaluate import evaluate, resolved
from batchsim.result import figures, run_json
from batchsim.shipped import shipped
from batchsim.sweep import point as one_point
from batchsim.sweep import points, pool
from batchsim.sweep.result import SweepResult
from batchsim.sweep.run import Sweep, of, run
from batchsim.sweep.store import only_writer
from tests.sweeps import SCENARIOS, SERVER, contents, server_sweep, started, written

POINTS = 12


@pytest.fixture(scope="module")
def sweep() -> Sweep:
    return of(server_sweep(POINTS), draws=0)


@pytest.fixture(scope="module")
def whole(sweep: Sweep, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The folder of a sweep that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run(sweep, folder, workers=0)
    return contents(folder)


class TestPoints:
    def test_each_has_a_file_by_its_hash_with_the_run_that_its_scenario_gives(
        self, sweep: Sweep, whole: dict[str, bytes]
    ) -> None:
        assert {name for name in whole if "/" in name} == {f"points/{point.hash}.json" for point in sweep.points}
        assert len(sweep.points) == POINTS == len({point.hash for point in sweep.points})
        for point in sweep.points:
            found = json.loads(whole[f"points/{point.hash}.json"])
            expected = evaluate(resolved(SERVER, point.fields), file="x", base=Path())
            assert found["run"] == json.loads(json.dumps(run_json(expected)))
            assert found["fields"] == point.fields and found["hash"] == point.hash and found["error"] is None

    def test_quantiles_of_latencies_are_those_of_the_run(self, whole: dict[str, bytes]) -> None:
        for name in (name for name in whole if "/" in name):
            found = json.loads(whole[name])
            for latency, curve in found["cdf"]["sync"].items():
                assert len(curve) == 101 and curve == sorted(curve)
                known = found["run"]["schedules"]["sync"]["latency_ms"][latency]
                expected = [known[key] for key in ("p50", "p90", "p99")]
                assert [curve[50], curve[90], curve[99]] == pytest.approx(expected, abs=1e-6)

    def test_points_that_are_equal_are_one(self) -> None:
        found = run(
            of({"kind": "sweep", "name": "x", "scenario": SERVER, "list": [{"seed": 1}] * 3}, draws=0), workers=0
        )
        assert [point["fields"] for point in found.points] == [{"seed": 1}] * 3
        assert len({point["hash"] for point in found.points}) == 1

    def test_what_does_not_fit_is_recorded_and_the_rest_goes_on(self) -> None:
        grid = {"workload.request_rate": [None], "workload.num_prompts": [8, 60_000], "max_num_seqs": [4096]}
        grid |= {"workload.output_len": [4], "max_num_batched_tokens": [2048, 8192]}
        asked = {"kind": "sweep", "name": "x", "scenario": "serving_512_128.yaml", "grid": grid}
        found = run(of(asked, base=SCENARIOS, draws=0), workers=0)
        refused, served, together, too_many = found.points
        assert served["error"] is None and served["run"] is not None
        assert "found 2048, less than max_num_seqs" in refused["error"] and refused["error"] == together["error"]
        assert "requests at once" in too_many["error"] and too_many["run"] is None
        assert [row["schedule"] for row in found.rows()] == [None, "sync", None, None]
        assert found.failed == [refused, together, too_many]


class TestResult:
    def test_a_row_for_each_point_and_schedule_with_every_figure(self) -> None:
        asked = {"kind": "sweep", "name": "x", "scenario": SERVER, "grid": {"schedules": [["sync"]], "seed": [1, 2]}}
        found = run(of(asked, draws=4), workers=0)
        for point, row in zip(found.points, found.rows(), strict=True):
            drawn = evaluate(resolved(SERVER, point["fields"]), file="x", base=Path(), draws=4).results["sync"]
            expected = figures(drawn)
            bounds = {f"{key}.low": low for key, (low, _) in drawn.interval_90.items()}
            bounds |= {f"{key}.high": high for key, (_, high) in drawn.interval_90.items()}
            own = {"point": row["point"], "schedules": ["sync"], "seed": row["seed"], "schedule": "sync"}
            assert row == expected | bounds | own | {"hash": point["hash"], "error": None}
            assert bounds

    def test_table_frame_and_parquet_hold_the_rows(self, sweep: Sweep, tmp_path: Path) -> None:
        found = run(sweep, tmp_path, workers=0)
        rows = found.rows()
        assert found.table().to_pylist() == rows
        assert pq.read_table(tmp_path / "results.parquet").to_pylist() == rows
        assert found.frame().to_dict("records") == rows

    def test_fields_of_several_kinds_are_text_in_a_column(self) -> None:
        asked = {"kind": "sweep", "name": "x", "scenario": SERVER, "list": [{"seed": 1, "max_queue_delay_us": 1.5}, {}]}
        asked["list"] = [*asked["list"], {"schedules": ["sync"], "max_queue_delay_us": 3}]
        table = run(of(asked, draws=0), workers=0).table()
        assert table["schedules"].to_pylist() == [None, None, "sync"]
        assert table["max_queue_delay_us"].to_pylist() == [1.5, None, 3.0]

    def test_a_heat_map_leaves_out_points_without_a_value_of_its_fields(self) -> None:
        listed = [{"max_batch_size": 2, "max_queue_delay_us": 1}, {"max_batch_size": 4}, {"max_queue_delay_us": 2}]
        found = run(of({"kind": "sweep", "name": "x", "scenario": SERVER, "list": listed}, draws=0), workers=0)
        heat = found.heatmap("max_batch_size", "max_queue_delay_us").data[0]
        assert (list(heat.x), list(heat.y)) == ([2], [1])

    def test_what_was_written_is_read_again(self, sweep: Sweep, tmp_path: Path) -> None:
        found = run(sweep, tmp_path, workers=0)
        assert SweepResult.load(tmp_path) == found
        with pytest.raises(InputError, match="no readable file"):
            SweepResult.load(tmp_path / "none")

    def test_figures_of_its_columns(self, sweep: Sweep) -> None:
        found = run(sweep, workers=0)
        lines = found.figure("workload.request_rate", "latency_ms.e2e.p99", color="max_batch_size")
        assert [trace.name for trace in lines.data] == ["4", "8"]
        assert sorted(y for trace in lines.data for y in trace.y) == sorted(found.frame()["latency_ms.e2e.p99"])
        heat = found.heatmap("workload.request_rate", "max_batch_size").data[0]
        assert heat.colorbar.title.text == "throughput_requests_per_s"
        assert (len(heat.x), len(heat.y), len(heat.z), len(heat.z[0])) == (3, 2, 2, 3)
        with pytest.raises(InputError, match=r"the nearest: workload\.request_rate"):
            found.figure("request_rate")
        with pytest.raises(InputError, match="wanted sync"):
            found.heatmap("workload.request_rate", "max_batch_size", schedule="async")
        assert "<table>" in found._repr_html_()


class TestEngines:
    def test_processes_give_the_bytes_that_one_gives(
        self, sweep: Sweep, whole: dict[str, bytes], tmp_path: Path
    ) -> None:
        run(sweep, tmp_path, workers=2)
        assert contents(tmp_path) == whole

    def test_a_worker_that_dies_costs_its_point_alone(
        self, sweep: Sweep, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        began = deadly(monkeypatch, tmp_path, once="4", always="")
        run(sweep, tmp_path / "out", workers=2)
        assert contents(tmp_path / "out") == whole
        sizes = Counter(point.fields["max_batch_size"] for point in sweep.points)
        # At two places at most was somebody at a point of that size when the note of the first was written.
        more = began() - sizes
        assert 1 <= more[4] <= 2 and not more[8]

    def test_a_point_that_kills_twice_has_failed_and_is_tried_again_by_the_next_sweep(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        two = of(server_sweep(4) | {"grid": {"max_batch_size": [3, 4, 8]}}, draws=0)
        began = deadly(monkeypatch, tmp_path, once="", always="4")
        found = run(two, tmp_path / "out", workers=1)
        assert began() == Counter({3: 1, 4: 2, 8: 1})
        assert [point["error"] for point in found.points] == [None, pool.DIED, None]
        assert SweepResult.load(tmp_path / "out") == found
        monkeypatch.undo()
        again = run(two, tmp_path / "out", workers=0)
        assert not again.failed
        assert again == run(two, tmp_path / "undisturbed", workers=0)
        assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")

    def test_a_worker_that_is_killed_before_it_begins_costs_nothing(
        self, sweep: Sweep, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        killed: list[int] = []

        class Stillborn(pool._Worker):
            def __init__(self) -> None:
                super().__init__()
                if len(killed) < 2 * pool.DEATHS:
                    killed.append(self._process.pid)
                    self._process.kill()

        monkeypatch.setattr(pool, "_Worker", Stillborn)
        run(sweep, tmp_path, workers=1)
        assert len(killed) == 2 * pool.DEATHS
        assert contents(tmp_path) == whole

    def test_a_worker_that_cannot_start_ends_the_sweep(self, sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pool, "WORKER", "timeit")  # any module that goes away
        with pytest.raises(RunError, match="before it began"):
            run(sweep, workers=1)


def deadly(monkeypatch: pytest.MonkeyPatch, folder: Path, *, once: str, always: str):  # type: ignore[no-untyped-def]
    """Workers that die at points of some sizes; returns what tells how often points of each size were begun."""
    log = folder / "log"
    log.touch()
    monkeypatch.setattr(pool, "WORKER", "tests.deadly_worker")
    for name, value in {"LOG": str(log), "ONCE": once, "ALWAYS": always}.items():
        monkeypatch.setenv(f"DEADLY_{name}", value)
    return lambda: Counter(map(int, log.read_text().split()))


class TestResume:
    def test_no_finished_point_is_run_again(self, sweep: Sweep, tmp_path: Path) -> None:
        half = of(server_sweep(POINTS), draws=0)
        del half.points[: POINTS // 2]
        run(half, tmp_path, workers=0)
        before = {path.name: path.stat() for path in (tmp_path / "points").iterdir()}
        told: list[int] = []
        run(sweep, tmp_path, workers=0, progress=lambda done, total, failed, before: told.append(done))
        after = {path.name: path.stat() for path in (tmp_path / "points").iterdir()}
        assert len(before) == POINTS // 2 and len(after) == POINTS
        assert all(after[name].st_ino == each.st_ino for name, each in before.items())
        assert told == list(range(POINTS // 2, POINTS + 1))

    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12: there may be threads
    def test_a_sweep_that_is_killed_at_any_moment_ends_with_the_same_bytes(
        self, sweep: Sweep, whole: dict[str, bytes], tmp_path: Path
    ) -> None:
        start = time.perf_counter()
        run(sweep, tmp_path / "timed", workers=0)
        took = time.perf_counter() - start
        draw = random.Random(7)
        done = []
        for number in range(10):
            folder = tmp_path / str(number)
            # A copy of this process, so that nothing has to be loaded first: most kills are in the middle of it.
            child = os.fork()
            if not child:
                try:
                    run(sweep, folder, workers=0)
                finally:
                    os._exit(0)
            time.sleep(draw.uniform(0, took))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            left = contents(folder) if folder.exists() else {}
            done.append(len([name for name in left if "/" in name and "/." not in name]))
            assert all(whole[name] == content for name, content in left.items() if not Path(name).name.startswith("."))
            run(sweep, folder, workers=0)
            assert contents(folder) == whole
        assert any(0 < count < POINTS for count in done)

    def test_so_does_the_whole_command(self, sweep: Sweep, whole: dict[str, bytes], tmp_path: Path) -> None:
        file = written(tmp_path / "sweep.yaml", server_sweep(POINTS))
        process = started(file, tmp_path / "out", "--workers", "1")
        wait_for_a_point(tmp_path / "out")
        process.kill()
        process.communicate()
        run(sweep, tmp_path / "out", workers=0)
        assert contents(tmp_path / "out") == whole

    def test_ctrl_c_keeps_what_is_done(self, whole: dict[str, bytes], tmp_path: Path) -> None:
        points = 400
        file = written(tmp_path / "sweep.yaml", server_sweep(points))
        process = started(file, tmp_path / "out", "--workers", "1")
        wait_for_a_point(tmp_path / "out")
        process.send_signal(signal.SIGINT)
        _, told = process.communicate()
        kept = contents(tmp_path / "out")
        assert process.returncode == 130 and b"points are done; the same command goes on" in told
        assert 0 < len(kept) < points and all(name.startswith("points/") for name in kept)
        assert not [name for name in kept if "/." in name]

    def test_only_what_killed_sweeps_left_is_removed(
        self, sweep: Sweep, whole: dict[str, bytes], tmp_path: Path
    ) -> None:
        (tmp_path / "points").mkdir()
        left = [f"points/.{sweep.points[0].hash}.json.ab1_xyz9", ".results.parquet.abcdefgh", ".sweep.json.a2345678"]
        foreign = ["notes.txt", ".hidden", "points/.sweep.jsonx"]
        for name in (*left, *foreign):
            (tmp_path / name).write_bytes(b"x")
        run(sweep, tmp_path, workers=0)
        assert contents(tmp_path) == whole | dict.fromkeys(foreign, b"x")

    def test_a_folder_has_one_writer(self, sweep: Sweep, tmp_path: Path) -> None:
        with only_writer(tmp_path), pytest.raises(InputError, match="another sweep writes into"):
            run(sweep, tmp_path, workers=0)
        run(sweep, tmp_path, workers=0)

    def test_a_damaged_point_is_told(self, sweep: Sweep, tmp_path: Path) -> None:
        run(sweep, tmp_path, workers=0)
        path = tmp_path / "points" / f"{sweep.points[0].hash}.json"
        path.write_text("{")
        with pytest.raises(InputError, match=r"found no JSON, wanted .* remove it and start"):
            run(sweep, tmp_path, workers=0)


def wait_for_a_point(out: Path) -> None:
    """Until a first point is done."""
    for _ in range(6000):
        if any(path.suffix == ".json" for path in (out / "points").glob("*")):
            return
        time.sleep(0.01)
    raise AssertionError("no point in a minute")


class TestCommand:
    def test_json_is_the_summary_with_the_rows(self, sweep: Sweep, whole: dict[str, bytes], tmp_path: Path) -> None:
        file = written(tmp_path / "sweep.yaml", server_sweep(POINTS))
        done = CliRunner().invoke(app, ["sweep", str(file), "--workers", "0", "--draws", "0", "--json"])
        assert done.exit_code == 0
        told = json.loads(done.stdout)
        assert told.pop("results") == SweepResult("", list(sweep.fields), run(sweep, workers=0).points).rows()
        assert told == json.loads(whole["sweep.json"])

    def test_other_commands_say_which_one_takes_a_sweep(self, tmp_path: Path) -> None:
        file = written(tmp_path / "sweep.yaml", server_sweep(4))
        done = CliRunner().invoke(app, ["run", str(file)])
        assert done.exit_code == 2 and "`batchsim sweep` is the command for this one" in done.stderr
        done = CliRunner().invoke(app, ["sweep", str(SCENARIOS / "dynamic_table.yaml")])
        assert done.exit_code == 2 and "`batchsim run` is the command for this one" in done.stderr

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            (["--engine", "spark"], "--engine: found the string 'spark', wanted processes or ray"),
            (["--address", "auto"], "--address: found the string 'auto', wanted --engine ray as well"),
            (["--engine", "ray", "--workers", "2"], "--workers: found 2, wanted --engine processes"),
            (["--set", "grid.max_batch_sze=[1]"], "grid.max_batch_sze: found an unknown key in point 1"),
        ],
    )
    def test_options_are_checked(self, options: list[str], told: str, tmp_path: Path) -> None:
        file = written(tmp_path / "sweep.yaml", server_sweep(4))
        done = CliRunner().invoke(app, ["sweep", str(file), *options])
        assert done.exit_code == 2 and told in done.stderr

    def test_examples_are_possible(self) -> None:
        from batchsim.sweep.run import read

        files = sorted(SCENARIOS.glob("sweep_*.yaml"))
        assert files
        for file in files:
            assert all(point.refused is None for point in read(file, draws=0).points)


class TestMachine:
    @pytest.mark.parametrize("error", [MemoryError(), OSError(5, "Input/output error")])
    def test_what_the_machine_lacked_is_told_and_tried_again(
        self, error: Exception, sweep: Sweep, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(*_: object, **__: object) -> None:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(one_point, "evaluate", fails)
            found = run(sweep, tmp_path, workers=0)
        assert len(found.failed) == POINTS and type(error).__name__ in found.failed[0]["error"]
        assert not list((tmp_path / "points").iterdir())
        run(sweep, tmp_path, workers=0)
        assert contents(tmp_path) == whole

    def test_a_full_disk_is_told_with_the_file_and_leaves_nothing_half_written(self, tmp_path: Path) -> None:
        file = written(tmp_path / "sweep.yaml", server_sweep(4))
        command = f"ulimit -f 4; exec {sys.executable} -m batchsim sweep {file} --out {tmp_path / 'out'} --workers 0"
        done = subprocess.run(["bash", "-c", command], cwd=SCENARIOS.parent, capture_output=True, text=True)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith(str(tmp_path / "out" / "points")) and done.stderr.count("\n") == 1
        assert contents(tmp_path / "out") == {}

    def test_processes_run_this_code_whatever_lies_in_the_working_directory(
        self, sweep: Sweep, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("batchsim", "numpy"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text("raise SystemExit(3)")
        monkeypatch.chdir(tmp_path)
        run(sweep, tmp_path / "out", workers=1)
        assert contents(tmp_path / "out") == whole

    @pytest.mark.parametrize("workers", [-1, 1.5])
    def test_impossible_numbers_of_processes_are_refused(self, sweep: Sweep, workers: int) -> None:
        with pytest.raises(InputError, match=r"workers: found .* wanted an integer, 0 or more"):
            run(sweep, workers=workers)

    def test_what_fits_into_memory_is_part_of_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        known, other = shipped("memory"), tmp_path / "h200.json"
        other.write_text("{}")
        before = points.code_version.__wrapped__()
        monkeypatch.setattr(points, "shipped", lambda folder: known | {"h200": other})
        assert known and points.code_version.__wrapped__() != before

    def test_so_is_whether_numba_is_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = points.code_version.__wrapped__()
        monkeypatch.setattr(points, "_LIBRARIES", ("no-such-library", *points._LIBRARIES[1:]))
        assert points.code_version.__wrapped__() != before
