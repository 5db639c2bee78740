"""One scenario as plain data: what it gives is what its file gives, and it is left as it was."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchsim import dynamic, engine, training, yaml_loader
from batchsim.errors import InputError
from batchsim.evaluate import evaluate, resolved
from batchsim.profile import load_profile
from batchsim.result import figures, run_json
from tests.sweeps import SCENARIOS, SERVER

SMALL = {"workload.num_prompts": 60, "schedules": ["sync", "async"]}


def serving(**sets: Any) -> dict[str, Any]:
    document = yaml_loader.load(SCENARIOS / "serving_512_128.yaml").data
    return resolved(document, SMALL | {key.replace("__", "."): value for key, value in sets.items()})


def leaves(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if isinstance(value, dict) and value:
        return {place: leaf for key, below in value.items() for place, leaf in leaves(below, (*path, key)).items()}
    return {path: value}


NAMES = st.sampled_from(["a", "b", "c", "d"])
TREES = st.recursive(st.integers(), lambda below: st.dictionaries(NAMES, below, min_size=1, max_size=3), max_leaves=8)


class TestResolved:
    @given(document=st.dictionaries(NAMES, TREES), path=st.lists(NAMES, min_size=1, max_size=3), value=st.integers())
    def test_changes_one_place_of_a_copy_and_nothing_else(
        self, document: dict[str, Any], path: list[str], value: int
    ) -> None:
        before = deepcopy(document)
        try:
            found = resolved(document, {".".join(path): value})
        except InputError:  # it leads through a number
            places = [tuple(path[:n]) for n in range(1, len(path))]
            assert any(place in leaves(document) for place in places)
            return
        finally:
            assert document == before
        # What was below the place is gone, as is a mapping there that was empty.
        others = {place: leaf for place, leaf in leaves(before).items() if place[: len(path)] != tuple(path)}
        others = {place: leaf for place, leaf in others.items() if tuple(path)[: len(place)] != place}
        assert leaves(found) == others | {tuple(path): value}


class TestEvaluate:
    def test_a_serving_loop_is_simulated_as_from_its_file(self) -> None:
        from batchsim.scenario import load

        scenario = load(SCENARIOS / "serving_512_128.yaml", ["workload.num_prompts=60", "schedules=[sync, async]"])
        expected = engine.simulate(scenario, load_profile(scenario.profile))
        assert run_json(evaluate(serving(), file="x", base=SCENARIOS)) == run_json(expected)

    def test_so_is_a_service(self) -> None:
        from batchsim.dynamic_scenario import DynamicScenario

        expected = dynamic.simulate(DynamicScenario.model_validate(SERVER), None)
        assert run_json(evaluate(SERVER, file="x", base=Path())) == run_json(expected)

    def test_and_a_training_loop(self) -> None:
        from batchsim.training_profile import load_training_profile
        from batchsim.training_scenario import load

        path = SCENARIOS / "training_1b_h200.yaml"
        scenario = load(path)
        expected = training.simulate(scenario, load_training_profile(scenario.profile))
        found = evaluate(yaml_loader.load(path).data, file="x", base=path.parent)
        assert run_json(found) == run_json(expected)

    def test_intervals_hold_their_figures_and_change_none(self) -> None:
        plain, drawn = (evaluate(serving(), file="x", base=SCENARIOS, draws=draws) for draws in (0, 4))
        for name, result in drawn.results.items():
            assert figures(result) == figures(plain.results[name])
            assert result.interval_90 and not plain.results[name].interval_90
            for key, (low, high) in result.interval_90.items():
                assert low <= figures(result)[key] <= high
        assert drawn.windows == plain.windows

    def test_refusals_name_the_file(self) -> None:
        with pytest.raises(InputError, match=r"^chat\.yaml: max_num_seqs: found 0, wanted an integer"):
            evaluate(serving(max_num_seqs=0), file="chat.yaml", base=SCENARIOS)
        with pytest.raises(InputError, match=r"^chat\.yaml: max_num_seqs: found \d+ requests at once"):
            evaluate(
                serving(workload__request_rate=None, workload__num_prompts=60_000, max_num_seqs=8192),
                file="chat.yaml",
                base=SCENARIOS,
            )

    def test_a_trace_that_has_changed_is_another_one(self, tmp_path: Path) -> None:
        scenario = SERVER | {"workload": {"kind": "trace", "path": "trace.csv"}}
        head = "arrived_at,num_prefill_tokens,num_decode_tokens\n"
        for count in (3, 3, 5):
            (tmp_path / "trace.csv").write_text(head + "0.5,20,1\n" * count, encoding="utf-8")
            found = evaluate(scenario, file="x", base=tmp_path)
            assert found.results["sync"].counts["requests"] == count

    def test_a_profile_is_parsed_once(self) -> None:
        assert load_profile("h200-llama-3.1-8b") is load_profile("h200-llama-3.1-8b")
