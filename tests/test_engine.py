"""Scenario in, result out: the same bytes for the same seed, draws of their own for every stream, clear refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest

from batchsim.costs import Draws
from batchsim.engine import simulate
from batchsim.errors import InputError, RunError
from batchsim.result import run_json
from batchsim.schedules import SCHEDULES
from batchsim.schedules.sync import sync
from tests.profiles import RATIOS, scenario, small_profile
from tests.requests import printed

PRINT_A_RUN = """
import json
from batchsim.engine import simulate
from batchsim.result import run_json
from tests.profiles import scenario, small_profile
for graphs in (True, False):
    run = simulate(scenario(seed=3, cuda_graphs=graphs), small_profile())
    print(json.dumps(run_json(run)), run.windows)
"""


def results(**changes: Any) -> dict[str, Any]:
    """The results by schedule, as `--json` gives them."""
    schedules: dict[str, Any] = run_json(simulate(scenario(**changes), small_profile()))["schedules"]
    return schedules


def test_the_same_seed_gives_the_same_bytes_in_every_process() -> None:
    assert len(printed(PRINT_A_RUN, "0", "1", "4711")) == 1


def test_seeds_and_replications_differ_where_costs_vary() -> None:
    told = [
        json.dumps(results(**where)) for where in ({}, {"seed": 1}, {"replication": 1}, {"seed": 1, "replication": 1})
    ]
    assert len(set(told)) == len(told)


@pytest.mark.parametrize("graphs", [True, False])
def test_without_jitter_there_is_no_variance(graphs: bool) -> None:
    told = {
        json.dumps(results(jitter=False, cuda_graphs=graphs, **where))
        for where in ({}, {"seed": 1}, {"replication": 5})
    }
    assert len(told) == 1


def test_jitter_keeps_the_mean() -> None:
    """The ratios' mean is one, so drawn costs come to what their means do."""
    varied, steady = (results(output_len=2_000, jitter=jitter)["sync"] for jitter in (True, False))
    assert varied["total_s"] == pytest.approx(steady["total_s"], rel=0.01)
    assert varied["step_ms"]["p99"] > 1.01 * steady["step_ms"]["p99"]


def test_a_schedule_draws_the_same_whichever_others_run() -> None:
    both, alone, swapped = (results(schedules=names) for names in (("sync", "async"), ("async",), ("async", "sync")))
    assert both["async"]["total_s"] == alone["async"]["total_s"]
    assert both == swapped
    assert alone["async"]["gain_over_sync"] is None
    assert both["sync"]["gain_over_sync"] == 0
    gain = both["async"]["throughput_tokens_per_s"] / both["sync"]["throughput_tokens_per_s"] - 1
    assert both["async"]["gain_over_sync"] == gain


def test_streams_of_draws_are_independent_of_one_another() -> None:
    def drawn(name: str, seed: int = 0, replication: int = 0) -> list[float]:
        draws = Draws(RATIOS, seed=seed, replication=replication, name=name)
        return [draws.next() for _ in range(5_000)]

    update = drawn("update")
    assert drawn("update") == update
    assert set(update) == set(RATIOS)
    assert all(update != other for other in (drawn("schedule"), drawn("update", 1), drawn("update", 0, 1)))


def test_every_token_is_counted_once() -> None:
    for schedule, result in results(num_prompts=7, output_len=13).items():
        counts = result["counts"]
        assert (counts["requests"], counts["output_tokens"]) == (7, 7 * 13)
        assert counts["wasted_tokens"] == (7 if schedule == "async" else 0)
        assert result["throughput_tokens_per_s"] == pytest.approx(7 * 13 / result["total_s"])
        idle_s = sum(result["idle_ns"].values()) / 1e9
        assert idle_s + result["device_busy_fraction"] * result["total_s"] == pytest.approx(result["total_s"])


def test_progress_grows_to_its_end() -> None:
    told: list[float] = []
    simulate(scenario(num_prompts=4, output_len=500), small_profile(), progress=told.append)
    assert told == sorted(told)
    assert told[0] >= 0 and 0.9 < told[-1] <= 1


def test_windows_are_of_the_schedules_that_ran() -> None:
    run = simulate(scenario(output_len=60), small_profile())
    assert list(run.windows) == list(run.results) == ["sync", "async"]
    for spans in run.windows.values():
        assert {span.lane for span in spans} == {"host", "copy_in", "compute", "copy_out"}
        assert list(spans) == sorted(spans, key=lambda span: (span.start_ns, span.end_ns))


def test_a_profile_of_another_model_is_refused() -> None:
    with pytest.raises(InputError, match=r"profile: found small, measured for llama-3\.1-8b, wanted one for"):
        simulate(scenario(), small_profile("llama-3.1-8b"))


def test_what_does_not_fit_the_device_is_refused() -> None:
    with pytest.raises(InputError, match="max_num_seqs"):
        simulate(
            scenario(num_prompts=400, input_len=30_000, max_num_seqs=400, max_num_batched_tokens=512), small_profile()
        )


def test_a_loop_that_was_not_measured_cannot_run() -> None:
    loops = {name: loop for name, loop in small_profile().loops.items() if name != "async/eager"}
    with pytest.raises(RunError, match="no costs for async/eager; it has sync/graph, async/graph, sync/eager"):
        simulate(scenario(cuda_graphs=False), small_profile(loops=loops))


def test_a_schedule_that_ends_too_early_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def hasty() -> Any:
        program = sync()
        operation = next(program)
        for _ in range(50):
            operation = program.send((yield operation))

    monkeypatch.setitem(SCHEDULES, "sync", hasty)
    with pytest.raises(RunError, match="6 requests not served"):
        simulate(scenario(), small_profile())
