"""Sweep files: the points that they stand for, what each is named by, and what a wrong line gets told."""

from __future__ import annotations

from decimal import Decimal
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from batchsim import yaml_loader
from batchsim.errors import InputError
from batchsim.sweep import points as points_module
from batchsim.sweep.run import Sweep, of, read
from batchsim.sweep.spec import Bounds, LatinHypercube, SweepSpec
from tests.sweeps import SCENARIOS, SERVER, server_sweep, written

SERVING = yaml_loader.load(SCENARIOS / "serving_512_128.yaml").data


def sweep(scenario: Any = SERVING, **way: Any) -> Sweep:
    return of({"kind": "sweep", "name": "x", "scenario": scenario, **way}, base=SCENARIOS, draws=0)


def fields_of(found: Sweep) -> list[dict[str, Any]]:
    return [point.fields for point in found.points]


def values(start: float, stop: float, step: float) -> list[float]:
    spec = SweepSpec(
        kind="sweep", name="x", scenario="s.yaml", grid={"seed": {"start": start, "stop": stop, "step": step}}
    )
    return [each["seed"].value for each in spec.points(lambda path, value: False)]


class TestGrid:
    def test_every_combination_is_a_point_the_last_field_fastest(self) -> None:
        rates, sizes, loops = [2, 4.5], [8, 16, 32], [["sync"], ["sync", "async"]]
        found = sweep(grid={"workload.request_rate": rates, "max_num_seqs": sizes, "schedules": loops})
        assert [tuple(each.values()) for each in fields_of(found)] == list(product(rates, sizes, loops))
        assert found.fields == ("workload.request_rate", "max_num_seqs", "schedules")

    def test_a_point_is_the_scenario_with_its_values_put_in(self) -> None:
        (point,) = sweep(grid={"workload.request_rate": [7], "slo.e2e_ms": [900]}).points
        expected = SERVING | {"workload": SERVING["workload"] | {"request_rate": 7}}
        assert point.document == expected | {"slo": SERVING["slo"] | {"e2e_ms": 900}}

    @given(st.integers(-50, 50), st.integers(0, 60), st.integers(1, 9))
    def test_steps_go_up_to_the_last_that_is_no_more_than_stop(self, start: int, more: int, step: int) -> None:
        found = values(start, start + more, step)
        assert found == list(range(start, start + more + 1, step))
        assert all(type(value) is int for value in found)

    @given(st.integers(0, 500), st.integers(0, 60), st.integers(1, 40), st.sampled_from(["0.1", "0.01", "0.05"]))
    def test_steps_of_fractions_are_those_that_are_written(self, start: int, steps: int, step: int, unit: str) -> None:
        first, by = start * Decimal(unit), step * Decimal(unit)
        expected = [float(first + by * i) for i in range(steps + 1)]
        assert values(float(first), float(first + by * steps), float(by)) == expected


class TestList:
    def test_each_entry_is_a_point(self) -> None:
        given = [{"max_num_seqs": 8}, {"workload.request_rate": 2, "max_num_seqs": 16}, {}]
        found = sweep(list=given)
        assert fields_of(found) == given
        assert found.fields == ("max_num_seqs", "workload.request_rate")


class TestLatinHypercube:
    @settings(deadline=None)  # the first draw loads scipy
    @given(
        points=st.integers(1, 40),
        seed=st.integers(0, 2**40),
        low=st.floats(0.01, 100),
        ratio=st.floats(1.5, 1000),
        scale=st.sampled_from(["linear", "log"]),
    )
    def test_each_of_as_many_equal_parts_of_a_range_has_one_point(
        self, points: int, seed: int, low: float, ratio: float, scale: Any
    ) -> None:
        bounds = Bounds(low=low, high=low * ratio, scale=scale)
        cube = LatinHypercube(points=points, seed=seed, fields={"a": bounds, "b": bounds})
        for name in ("a", "b"):
            drawn = sorted(point[name] for point in cube.drawn(lambda path, value: False))
            for i, value in enumerate(drawn):
                # Values are told to six digits.
                assert bounds.at(i / points) * (1 - 1e-5) <= value <= bounds.at((i + 1) / points) * (1 + 1e-5)

    def test_fields_that_take_integers_get_them(self) -> None:
        ranges = {"max_num_seqs": {"low": 1, "high": 64}, "workload.request_rate": {"low": 1, "high": 64}}
        found = fields_of(sweep(latin_hypercube={"points": 20, "fields": ranges}))
        assert all(type(each["max_num_seqs"]) is int and 1 <= each["max_num_seqs"] <= 64 for each in found)
        assert sum(each["workload.request_rate"] % 1 > 0 for each in found) > 10

    def test_the_seed_decides(self) -> None:
        ranges = {"workload.request_rate": {"low": 1, "high": 64, "scale": "log"}}

        def drawn(seed: int) -> list[dict[str, Any]]:
            return fields_of(sweep(latin_hypercube={"points": 9, "seed": seed, "fields": ranges}))

        assert drawn(3) == drawn(3) != drawn(4)


class TestHash:
    """A point's name depends on all that its result depends on, and on nothing else."""

    def hashes(self, scenario: Any = SERVER, base: Path = Path(), draws: int = 0) -> list[str]:
        document = {"kind": "sweep", "name": "x", "scenario": scenario, "grid": {"max_batch_size": [4, 8]}}
        return [point.hash for point in of(document, base=base, draws=draws).points]

    def test_points_differ_in_it(self) -> None:
        assert len(set(self.hashes())) == 2

    def test_neither_order_nor_what_is_left_unsaid_changes_it(self) -> None:
        turned = dict(reversed(SERVER.items()))
        assert self.hashes(turned) == self.hashes(turned | {"length_bucket": 64}) == self.hashes()

    def test_values_draws_and_code_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = {*self.hashes(), *self.hashes(SERVER | {"seed": 1}), *self.hashes(draws=8)}
        monkeypatch.setattr(points_module, "code_version", lambda: "another")
        assert len(found | set(self.hashes())) == 8

    def test_so_do_the_contents_of_profiles_and_traces_but_not_their_place(self, tmp_path: Path) -> None:
        from importlib.resources import files

        profile = (files("calibration") / "profiles" / "h200-bert-base.json").read_text(encoding="utf-8")
        trace = "arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,20,5\n0.5,30,7\n"
        scenario = {
            "kind": "dynamic", "name": "x", "model": "bert-base", "profile": "own.json",
            "workload": {"kind": "trace", "path": "trace.csv"},
        }  # fmt: skip

        def hashes(folder: str, profile: str, trace: str) -> list[str]:
            place = tmp_path / folder
            place.mkdir()
            (place / "own.json").write_text(profile, encoding="utf-8")
            (place / "trace.csv").write_text(trace, encoding="utf-8")
            return self.hashes(scenario, place)

        here = hashes("here", profile, trace)
        assert hashes("there", profile, trace) == here
        assert not set(hashes("slower", profile + " ", trace)) & set(here)
        assert not set(hashes("later", profile, trace.replace("0.5", "0.6"))) & set(here)


class TestRefused:
    """What no scenario can have is refused before anything runs, by the sweep's file, the key and the point."""

    @pytest.mark.parametrize(
        ("way", "told"),
        [
            ("grid: {max_num_sqs: [1]}", "grid.max_num_sqs: found an unknown key in point 1 of 1, wanted max_num_seqs"),
            (
                "grid:\n  seed: [1, 2]\n  max_num_seqs: [8, 0]",
                "6: grid.max_num_seqs: found 0 in point 2 of 4, wanted an integer from 1 to 65536",
            ),
            ("grid: {seed.x: [1]}", "4: grid.seed.x: found a mapping at seed in point 1 of 1, wanted an integer"),
            ("grid: {name.x: [1]}", "name.x: found the string 'Llama"),
            ("grid: {seed: []}", "4: grid.seed: found an empty list, wanted a list of values, or {start, stop, step}"),
            ("grid: {seed: {start: 1, stop: 2}}", "4: grid.seed: found a mapping, wanted a list of values, or"),
            ("grid: {seed: {start: 1, stop: 2, step: 0}}", "4: grid.seed.step: found 0, wanted a number above 0"),
            ("grid: {seed: {start: 3, stop: 2, step: 1}}", "4: grid.seed.stop: found 2, wanted at least start, 3"),
            ("grid: {seed: {start: 0, stop: 1e9, step: 1}}", "4: grid.seed: found 1,000,000,001 values"),
            ("grid: {a..b: [1]}", "4: grid.a..b: found the string 'a..b', wanted the path of a key"),
            ("list: [{max_num_seqs: 8}, {seed: x}]", "4: list.1.seed: found the string 'x' in point 2 of 2"),
            ("list: [{}]", "4: list: found no field in any point, wanted a mapping"),
            ("list: [{seed: 1}]\ngrid: {seed: [1]}", "4: list: found list beside grid, wanted one of grid, list"),
            ("latin_hypercube: {points: 3, fields: {seed: {low: 2, high: 2}}}", "seed.high: found 2, not more"),
            ("latin_hypercube: {points: 3, fields: {seed: {low: 0, high: 2, scale: log}}}", "low: found 0 on a log"),
            ("latin_hypercube: {points: 3, fields: {sed: {low: 0, high: 2}}}", "sed: found an unknown key in point 1"),
            ("grid: {profile: [h200-llama-3.1-8b, none.json]}", "4: grid.profile: found 'none.json' in point 2 of 2"),
            ("grids: {}", "4: grids: found an unknown key, wanted grid"),
            ("name: y", "4: name: found the key again, after line 2, wanted each key once"),
        ],
    )  # fmt: skip
    def test_by_key_and_point(self, way: str, told: str, tmp_path: Path) -> None:
        file = tmp_path / "s.yaml"
        head = f"kind: sweep\nname: x\nscenario: {SCENARIOS / 'serving_512_128.yaml'}\n"
        file.write_text(head + way, encoding="utf-8")
        with pytest.raises(InputError) as caught:
            read(file, draws=0)
        assert str(caught.value).startswith(str(file)) and told in str(caught.value)

    def test_each_problem_once(self) -> None:
        with pytest.raises(InputError) as caught:
            sweep(grid={"seed": [1, 2, 3], "max_num_seqs": [0, 8, "x"], "replicas": [0]})
        assert len(caught.value.problems) == 3

    def test_what_is_wrong_with_the_scenario_itself_is_told_of_it(self, tmp_path: Path) -> None:
        file = written(tmp_path / "s.yaml", server_sweep() | {"scenario": SERVER | {"max_batch_size": 0, "seeed": 1}})
        document = yaml.safe_load(file.read_text()) | {"grid": {"seed": [1, 2]}}
        with pytest.raises(InputError) as caught:
            read(written(file, document), draws=0)
        assert [problem.key for problem in caught.value.problems] == ["scenario.max_batch_size", "scenario.seeed"]
        assert all(problem.line is not None for problem in caught.value.problems)

    def test_a_scenario_that_is_not_there(self, tmp_path: Path) -> None:
        file = written(tmp_path / "s.yaml", server_sweep() | {"scenario": "none.yaml"})
        with pytest.raises(InputError, match=r"s\.yaml:\d+: scenario: found no file .*none\.yaml, wanted a scenario's"):
            read(file, draws=0)

    def test_values_that_do_not_go_together_are_points_that_say_so(self) -> None:
        found = sweep(grid={"max_num_seqs": [8, 128], "max_num_batched_tokens": [64, 8192]})
        assert [point.refused is not None for point in found.points] == [False, False, True, False]
        assert "found 64, less than max_num_seqs = 128" in str(found.points[2].refused)

    def test_unless_none_do(self) -> None:
        with pytest.raises(InputError, match="no point whose values go together"):
            sweep(grid={"max_num_seqs": [128, 256], "max_num_batched_tokens": [64]})
