"""Executions on other hardware: their lists, the runner that no process outlives, and the committed points."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from batchsim.errors import InputError
from batchsim.files import write_json
from batchsim.metrics import Totals
from calibration.hardware.__main__ import _ended_well, app, transferred_again
from calibration.hardware.neighbour import neighbours
from calibration.hardware.points import Configuration, read
from calibration.hardware.replicas import execute_replicas, merged
from calibration.hardware.table import kind_of
from calibration.hardware.worker import Job, _execute, missing, pin
from calibration.points import profile_of
from tests.profiles import small_profile
from tests.test_points import decoded_rows

FOLDER = Path(__file__).parents[1] / "calibration" / "validation" / "hardware"
TEST, LATER, FIT = FOLDER / "points.yaml", FOLDER / "later.yaml", FOLDER / "fit.yaml"
LIST = """
defaults: {max_num_batched_tokens: 64, cuda_graphs: false, model: tiny, profile: small}
configurations:
- {name: busy, neighbours: 1, points: one}
- {name: pair, replicas: 2, points: quick}
workloads:
  one:
  - {batch: 3, input_len: 20, output_len: 6}
  quick:
  - {batch: 3, input_len: 20, output_len: 6, schedules: [async]}
"""


def points_in(folder: Path) -> list[dict[str, Any]]:
    """The executed points of a folder; those of tensor parallelism and of fits have lists of their own."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [point for point in found if "configuration" in point.get("provenance", {}).get("measured", {})]


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a list of points of the toy model, and their profile."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "list.yaml").write_text(LIST, encoding="utf-8")
    write_json(folder / "profiles" / "small.json", small_profile("tiny").model_dump(mode="json"))
    return folder


def job(small: Path, name: str) -> Job:
    configuration = read(small / "list.yaml")[name]
    wanted = missing(configuration, small, "")
    return Job(configuration, wanted, "cpu", repeats=1, seconds=60, profiles=small / "profiles")


class TestLists:
    def test_the_test_list_asks_for_what_was_promised(self) -> None:
        configurations = read(TEST)
        for sms in (33, 66, 99):
            scenarios = configurations[f"sm{sms}"].scenarios.values()
            assert all(each.hardware is not None and each.hardware.device().sms == sms for each in scenarios)
            for model in ("llama-3.2-1b", "llama-3.1-8b"):
                assert len([each for each in scenarios if each.model == model]) >= 3
        configurations |= read(LATER)
        for name in ("core1", "busy", "latershared"):
            models = [each.model for each in configurations[name].scenarios.values()]
            assert min(models.count(model) for model in ("llama-3.2-1b", "llama-3.1-8b")) >= 2
        asked = {name: (each.cores, each.neighbours, each.replicas) for name, each in configurations.items()}
        assert asked["core1"] == (1, 0, 1)
        assert asked["busy"][:1] == (None,)
        assert asked["latershared"] == (1, 1, 1)
        assert (asked["pair2"], asked["pair1"]) == ((2, 0, 2), (1, 0, 2))

    def test_a_loop_that_shares_its_core_leaves_it_while_it_waits(self) -> None:
        crowded = [name for name, each in (read(TEST) | read(LATER)).items() if each.crowded]
        assert crowded == ["pair1", "latershared"]

    def test_no_test_point_is_among_those_that_a_law_is_judged_by(self) -> None:
        def shape(each: Any) -> tuple[Any, ...]:
            return each.model, each.max_num_seqs, each.workload.input_len, each.workload.output_len

        lists = [
            [each for configuration in read(path).values() for each in configuration.scenarios.values()]
            for path in (TEST, FIT)
        ]
        test, fit = ({shape(each) for each in scenarios} for scenarios in lists)
        assert not test & fit
        parts = [{each.hardware.sms for each in scenarios if each.hardware} for scenarios in lists]
        assert not parts[0] & parts[1] - {None}
        for each in lists[0]:
            assert each.max_num_seqs not in decoded_rows(profile_of(each.profile, None)), each.name

    def test_an_unknown_key_is_refused_with_the_one_that_was_meant(self, tmp_path: Path) -> None:
        path = tmp_path / "list.yaml"
        path.write_text(LIST.replace("neighbours", "neighbors"), encoding="utf-8")
        with pytest.raises(
            InputError, match=r"configurations\.0: found the string 'neighbors', wanted .*perhaps neighbours"
        ):
            read(path)

    def test_a_bad_value_is_refused_by_its_place(self, tmp_path: Path) -> None:
        path = tmp_path / "list.yaml"
        path.write_text(LIST.replace("replicas: 2", "replicas: 2000"), encoding="utf-8")
        told = call("run", path, "--device", "cpu", "--out", tmp_path / "out")
        assert told.exit_code == 2
        assert "configurations.1.replicas: found 2000" in told.stderr


class TestRunner:
    def test_nothing_outlives_its_time(self, tmp_path: Path) -> None:
        """A process that hangs, and one that it has started, are gone when the runner goes on."""
        note = tmp_path / "pids"
        command = f"sleep 60 & echo $$ $! > {note}; wait"
        assert not _ended_well(["sh", "-c", command], -4)  # five seconds of grace belong to every limit
        for pid in map(int, note.read_text(encoding="utf-8").split()):
            assert _gone(pid)

    @pytest.mark.parametrize(("code", "well"), [("0", True), ("3", False)])
    def test_how_a_process_ended_is_told(self, code: str, well: bool) -> None:
        assert _ended_well([sys.executable, "-c", f"raise SystemExit({code})"], 30) is well

    def test_points_that_are_there_are_not_executed_again(self, small: Path, tmp_path: Path) -> None:
        for name, configuration in read(small / "list.yaml").items():
            (only,) = configuration.scenarios
            assert list(missing(configuration, tmp_path, "")) == [only]
            assert list(missing(configuration, tmp_path, name)) == [only]
            assert not missing(configuration, tmp_path, "other")
            write_json(tmp_path / f"{only}.json", {})
        told = call("run", small / "list.yaml", "--device", "cpu", "--out", tmp_path)
        assert (told.exit_code, told.output) == (0, "")

    @pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no program may choose its cores here")
    def test_a_process_is_kept_to_so_many_cores(self) -> None:
        before = os.sched_getaffinity(0)
        try:
            assert pin(None) == len(before)
            assert pin(1) == 1 == len(os.sched_getaffinity(0))
        finally:
            os.sched_setaffinity(0, before)


def _alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def _gone(pid: int) -> bool:
    """Whether a process that was killed ends, which takes a moment."""
    end = time.monotonic() + 10
    while _alive(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not _alive(pid)


class TestExecuted:
    def test_beside_a_neighbour(self, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("calibration.validate.PROBE_SEQS", 4)  # a CPU is slow
        (point,) = _execute(job(small, "busy"))
        assert set(point["measured"]) == {"sync", "async"}
        for result in point["measured"].values():
            assert result["counts"]["output_tokens"] == 3 * 6
        facts = point["provenance"]["measured"]
        assert all(run["host_share"] > 0 for runs in facts["repeats"].values() for run in runs)
        predicted = transferred_again(point, small_profile("tiny"))
        assert predicted["measured"] == point["measured"]
        assert set(predicted["error"]) == {"sync", "async"}

    def test_replicas_serve_all_requests_between_them(self, small: Path) -> None:
        (point,) = _execute(job(small, "pair"))
        for result in point["measured"].values():
            assert result["counts"]["requests"] == 6
            assert result["counts"]["output_tokens"] == 6 * 6
            assert result["throughput_tokens_per_s"] == pytest.approx(36 / result["total_s"])
        assert kind_of(point) == "replicas"
        predicted = transferred_again(point, small_profile("tiny"))
        assert all(predicted["predicted"][name]["counts"]["output_tokens"] == 36 for name in predicted["measured"])

    def test_too_few_devices_are_refused(self, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
        asked = job(small, "pair")
        alone = Job(asked.configuration, asked.scenarios, "cuda", asked.repeats, asked.seconds, asked.profiles)
        with pytest.raises(InputError, match="found 2, with a device each, wanted at most 1"):
            next(execute_replicas(alone))


class TestNeighbours:
    def test_they_work_until_the_block_ends(self) -> None:
        with neighbours(1, 30):
            ours = [pid for pid in _children() if _alive(pid)]
            assert len(ours) == 1
        assert _gone(ours[0])


def _children() -> list[int]:
    tasks = Path(f"/proc/{os.getpid()}/task")
    return [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]


class TestMerged:
    def run(self, total_ns: int, steps: int = 4) -> dict[str, Any]:
        totals = {
            "total_ns": total_ns, "stage_ns": {"wait": 40}, "stage_steps": {"prefill": 1}, "idle_ns": {}, "gap_ns": 0,
            "busy_ns": total_ns // 2, "no_requests_ns": 0, "steps_ns": [total_ns // steps] * steps, "replicas": 1,
        }  # fmt: skip
        return {"totals": totals, "counts": {"requests": 2, "output_tokens": 10}}

    def test_twice_the_same_is_twice_the_throughput(self) -> None:
        one, two = (merged("sync", [self.run(1000)] * count) for count in (1, 2))
        assert two.throughput == 2 * one.throughput
        assert (two.device_busy_fraction, two.total_s) == (one.device_busy_fraction, one.total_s)
        assert two.counts["steps"] == 2 * one.counts["steps"]

    def test_the_last_one_ends_the_run(self) -> None:
        found = merged("sync", [self.run(1000), self.run(4000)])
        assert found.total_s == 4000 / 1e9
        assert found.throughput == pytest.approx(20 / 4000e-9)
        assert found.idle_ns["no_requests"] == round(3000 / 2)
        assert np.isclose(found.device_busy_fraction, 2500 / 8000)

    def test_one_alone_is_what_its_totals_say(self) -> None:
        run = self.run(1000)
        totals = Totals(**{**run["totals"], "steps_ns": np.array(run["totals"]["steps_ns"])})
        assert merged("sync", [run]) == totals.result("sync", run["counts"])


EXECUTED = [
    pytest.param(point, path, id=f"{path.stem}-{point['scenario']['name']}")
    for path, folder in ((TEST, FOLDER), (LATER, FOLDER / "later"), (FIT, FOLDER / "fit"))
    for point in points_in(folder)
]
each_point = pytest.mark.parametrize(("point", "path"), EXECUTED)


class TestCommittedPoints:
    @each_point
    def test_a_point_is_of_its_list_on_the_part_that_was_there(self, point: dict[str, Any], path: Path) -> None:
        facts, scenario = point["provenance"]["measured"], point["scenario"]
        configuration: Configuration = read(path)[facts["configuration"]]
        listed = configuration.scenarios[scenario["name"]].model_dump(mode="json")
        asked, there = listed.pop("hardware", None), scenario.get("hardware")
        assert listed == {key: value for key, value in scenario.items() if key != "hardware"}
        if isinstance(asked, dict) and "sms" in asked:
            # The device is cut in eights.
            assert there == asked | {"sms": -(-asked["sms"] // 8) * 8}
            assert facts["limited_to_multiprocessors"] == there["sms"]
        else:
            assert there == asked
        assert facts["neighbours"] == configuration.neighbours
        assert configuration.cores in (None, facts["cores_used"])

    @each_point
    def test_the_stored_prediction_is_made_again_to_the_last_digit(self, point: dict[str, Any], path: Path) -> None:
        again = transferred_again(point, profile_of(point["profile"], None))
        assert json.loads(json.dumps(again)) == point

    def test_parts_and_slowed_hosts_are_predicted_as_well_as_was_measured(self) -> None:
        """Tokens a second of all test points, both schedules: the median and the worst absolute error."""
        found: dict[str, list[float]] = {}
        for point in (*points_in(FOLDER), *points_in(FOLDER / "later")):
            errors = (abs(error["throughput_tokens_per_s"]) for error in point["error"].values())
            found.setdefault(kind_of(point), []).extend(errors)
        parts, hosts = found["part of the device"], found["slowed host"]
        assert len(parts) == 60 and len(hosts) == 32
        assert np.median([*parts, *hosts]) < 0.04
        assert max(parts) < 0.07
        assert max(hosts) < 0.11
