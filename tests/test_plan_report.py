"""What people see of a plan, and of what each stage is worth: tables in the terminal, and pages for the browser."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from batchsim.explain.result import Explained, Explanation, Gain
from batchsim.plan.candidate import Trial
from batchsim.plan.objectives import parse
from batchsim.plan.result import PlanResult
from batchsim.report import explain, plan
from batchsim.report.plan import print_plan, write_plan_report
from batchsim.report.plan_words import COST, columns_of, in_order, passes, rows_of, verdict
from tests.browser import DARK, PHONE_PX, use
from tests.planned import OBJECTIVES, PRICES, REFUSED, planned
from tests.test_report import References
from tests.test_sweep_report import LOOKS, SHOWN, embedded

TTFT = "latency_ms.ttft.p99"


@pytest.fixture(scope="module")
def found() -> PlanResult:
    return planned()


@pytest.fixture(scope="module")
def explained() -> Explanation:
    gains = {
        "sync": [("decode", "device", 0.07, 0.8), ("update", "host", 0.011, 0.1), ("record", "host", 1e-5, 0.001)],
        "async": [("decode", "device", 0.099, 0.99), ("update", "host", 0.0, 0.1), ("record", "host", -0.02, 0.001)],
    }
    schedules = {}
    for name, stages in gains.items():
        each = tuple(
            Gain(stage, side, f"what {stage} does", gain, {"e2e.p50": gain * 0.9, "e2e.p99": gain * 0.8}, {}, share)
            for stage, side, gain, share in stages
        )
        everything = Gain("everything", "all", "every stage at once", 0.1, {"e2e.p50": 0.09, "e2e.p99": 0.09})
        schedules[name] = Explained(name, "throughput", {"throughput_tokens_per_s": 4_700.0}, each, everything)
    return Explanation("a service", 0.1, {"name": "a service"}, {"profile": "h200"}, schedules, 10)


def printed(show: Any, what: object, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    show(console, what)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def nowhere(found: PlanResult) -> PlanResult:
    """The plan of which no candidate meets the objectives."""
    some = tuple(trial for trial in found.evaluated if not passes(trial))
    return replace(found, best=None, runner_up=None, binds=None, evaluated=some, would_change=())


def test_candidates_come_in_the_order_of_how_good_they_are(found: PlanResult) -> None:
    trials = in_order(found)
    assert trials[0] is found.best and trials[1] is found.runner_up and len(trials) == len(found.evaluated)
    meets = [passes(trial) for trial in trials]
    assert meets == sorted(meets, reverse=True) and True in meets and False in meets
    costs = [trial.candidate.cost_per_hour for trial in trials[2:] if passes(trial)]
    assert costs == sorted(costs)
    misses = [min(trial.confident_margins.values()) for trial in trials if not passes(trial)]
    assert misses == sorted(misses, reverse=True)


def test_what_was_only_screened_is_taken_as_predicted(found: PlanResult) -> None:
    some = [trial for trial in found.evaluated if trial.result is not None]
    for trial in some:
        screened = replace(trial, draws=0)
        assert not screened.meets and passes(screened) is screened.passes
        if passes(trial):
            assert passes(screened)
    best = found.best
    assert best is not None
    value, bound = best.values["p99_ttft_ms"], best.bounds["p99_ttft_ms"]
    assert value is not None and bound is not None and value < bound
    close = replace(best, objectives=(parse("p99_ttft_ms", f"<={(value + bound) / 2:.3f}"),))
    assert close.passes and not passes(close) and passes(replace(close, draws=0))
    assert verdict(found, close) == close.why_not and "at a confidence of 90%" in str(close.why_not)


def test_rows_hold_what_the_trials_do(found: PlanResult) -> None:
    trials = in_order(found)
    data = embedded(plan.page(found))
    roles = {0: ["best"], 1: ["runner-up"]}
    for index, trial in enumerate(trials):
        far = trial.run is not None and trial.candidate.configuration.hardware != "h200"
        assert data["marks"].get(str(index), []) == roles.get(index, []) + ["transferred"] * far
    assert data["chosen"] == [0, 1]
    assert data["allowed"] == [passes(trial) for trial in trials]
    assert data["steady"] == [trial.stable for trial in trials]
    assert set(data["errors"].values()) == {REFUSED}
    assert data["bounds"] == {"ttft": OBJECTIVES[0].limit}
    for index, trial in enumerate(trials):
        cost, price = trial.cost_per_million_tokens, PRICES[trial.candidate.configuration.hardware]
        assert data["values"][COST][index] == (None if cost is None else pytest.approx(cost, rel=1e-6))
        assert data["values"]["cost_per_hour"][index] == pytest.approx(trial.candidate.replicas * price)
        assert (str(index) in data["details"]) == (trial.run is not None)
    first = [column["key"] for column in data["columns"] if column["kind"] == "figure"][3:5]
    assert first == [each.figure for each in OBJECTIVES]
    assert "tensor_parallel" not in data["values"]


def test_degrees_of_tensor_parallelism_are_a_column_where_they_differ(found: PlanResult) -> None:
    def halved(trial: Trial) -> Trial:
        of = replace(trial.candidate.configuration, tensor_parallel=2, fields={"workload.request_rate": 3})
        return replace(trial, candidate=replace(trial.candidate, configuration=of))

    pairs = replace(found, evaluated=tuple(halved(trial) for trial in found.evaluated[:4]) + found.evaluated[4:])
    columns = columns_of(pairs, rows_of(pairs, pairs.evaluated))
    assert {"tensor_parallel", "request_rate"} <= {column.label for column in columns}


def test_pages_refer_to_nothing_outside_themselves_and_are_the_same_every_time(
    found: PlanResult, explained: Explanation
) -> None:
    for text, again in ((plan.page(found), plan.page(planned())), (explain.page(explained), explain.page(explained))):
        parser = References()
        parser.feed(text)
        assert parser.found == []
        assert "default-src 'none'" in text and "@import" not in text.partition("</style>")[0]
        assert text == again
        assert len(text) < 8_000_000


def test_texts_cannot_become_markup(found: PlanResult, explained: Explanation) -> None:
    evil = "</script><script>alert(1)</script><img src=x>"
    of = found.evaluated[0].candidate.configuration
    trial = replace(
        found.evaluated[0],
        refused=evil,
        candidate=replace(found.evaluated[0].candidate, configuration=replace(of, hardware=evil)),
    )
    changed = replace(found, name=evil, evaluated=(trial, *found.evaluated[1:]), partial=evil)
    assert evil not in plan.page(changed)
    assert evil not in explain.page(replace(explained, name=evil, scenario={"name": evil}))


@pytest.mark.parametrize("width", [60, 80, 130])
def test_the_terminal_shows_the_plan_within_its_width(found: PlanResult, width: int) -> None:
    for each in (found, nowhere(found), replace(found, partial="interrupted after 9 simulations")):
        text = printed(print_plan, each, width)
        assert max(len(line) for line in text.splitlines()) <= width
        assert "…" not in text
        words = " ".join(text.split())
        assert all(" ".join(sentence.split()) in words for sentence in each.sentences)
        assert "8 candidates cannot run: hardware: found l40s" in words
    text = printed(print_plan, found, width)
    assert text.count("▶ ") == 2 and text.count("▷ ") == 2  # in the table and in its key
    assert ("verdict" in text) == (width >= 120)
    assert "what lower latency costs" in text


def test_the_terminal_shows_values_with_what_they_stay_under(found: PlanResult) -> None:
    best = found.best
    assert best is not None
    value, bound = best.values["p99_ttft_ms"], best.bounds["p99_ttft_ms"]
    row = next(line for line in printed(print_plan, found).splitlines() if line.startswith("▶ "))
    assert f"{value:,.0f} ({bound:,.0f})" in row
    assert f"{best.candidate.cost_per_hour:.2f}" in row


def test_a_plan_without_an_answer_has_a_page(found: PlanResult) -> None:
    text = plan.page(nowhere(found)).split("<body>")[1]
    assert "No candidate meets all objectives" in text and 'id="explored"' in text
    nothing = replace(nowhere(found), evaluated=(), frontier=(), latency=None)
    assert "No candidate meets all objectives" in plan.page(nothing)
    assert "interrupted" in plan.page(replace(found, partial="interrupted after 9 simulations"))


@pytest.mark.parametrize("width", [60, 80, 130])
def test_the_terminal_shows_what_stages_are_worth(explained: Explanation, width: int) -> None:
    text = printed(explain.print_explain, explained, width)
    assert max(len(line) for line in text.splitlines()) <= width and "…" not in text
    assert re.search(r"decode +device +80\.0% +\+7\.0% +\+6\.3%", text)
    assert re.search(r"update +host +10\.0% +\+1\.1%", text)
    assert "Next to nothing is gained by record." in text and "Next to nothing is gained by update." in text
    assert re.search(r"record +host +0\.1% +-2\.0%", text)
    assert ("E2E p99" in " ".join(text.split())) == (width >= 116)


def used(folder: Path, pages: dict[str, tuple[str, str]], *arguments: str, width: int = 1200) -> list[Any]:
    scripts = {}
    for name, (text, script) in pages.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
        scripts[folder / f"{name}.html"] = script
    return [answer["found"] for answer in use(folder, scripts, *arguments, width=width)]


USED = f"""
  const found = {{ first: {SHOWN}, frontier: document.documentElement.dataset.frontier }};
  found.cells = [drawn("map")[0].z, drawn("map")[0].rows, drawn("map")[1].text];
  found.names = ["xaxis", "yaxis"].map(each => document.getElementById("map").layout[each].ticktext);
  found.symbols = drawn("scatter").slice(0, 3).map(each => [each.name, each.customdata, each.marker.symbol]);
  found.bound = drawn("cumulative").map(each => each.name).at(-1);
  found.lanes = new Set(drawn("timeline").flatMap(stage => stage.y)).size;
  await change(document.getElementById("filter"), "runner-up", "input");
  found.filtered = {SHOWN};
  await change(document.getElementById("filter"), "margin>0 cost_per_hour<=7.5", "input");
  found.cheap = {SHOWN};
  return found;
"""


def test_a_browser_shows_cost_feasibility_and_the_choice(
    found: PlanResult, explained: Explanation, tmp_path: Path
) -> None:
    pages = {"plan": (plan.page(found), USED), "explain": (explain.page(explained), "return drawn('gains').length")}
    shown, bars = used(tmp_path, pages)
    trials = in_order(found)
    assert bars == 2
    assert shown["first"] == list(range(len(trials)))
    assert {trials[int(index)].candidate for index in shown["frontier"].split()} == {
        trial.candidate for trial in found.frontier
    }
    for name, rows, symbols in shown["symbols"]:
        assert {trials[index].candidate.configuration.hardware for index in rows} == {name}
        assert symbols == ["circle" if passes(trials[index]) else "x" for index in rows]
    (across, up), (cells, stands, texts) = shown["names"], shown["cells"]
    assert across == ["1", "2", "3", "4"] and set(up) == set(PRICES)
    crossed = 0
    for line, hardware in enumerate(up):
        for column, replicas in enumerate(across):
            some = [
                trial
                for trial in trials
                if trial.candidate.configuration.hardware == hardware and trial.candidate.replicas == int(replicas)
            ]
            costs = [trial.cost_per_million_tokens for trial in some if passes(trial)]
            crossed += not costs
            assert cells[line][column] == (pytest.approx(min(c for c in costs if c), rel=1e-6) if costs else None)
            assert (stands[line][column] is None) == (not costs)
    assert texts.count("✗") == crossed > 0
    assert shown["bound"] == "at most 500 ms" and shown["lanes"] == 2 * 4
    assert shown["filtered"] == [1]
    cheap = [
        index
        for index, trial in enumerate(trials)
        if min(trial.confident_margins.values()) > 0 and trial.candidate.cost_per_hour <= 7.5
    ]
    assert shown["cheap"] == cheap and cheap


def test_pages_can_be_read_on_a_phone_in_the_dark(found: PlanResult, tmp_path: Path) -> None:
    (shown,) = used(tmp_path, {"plan": (plan.page(found), LOOKS)}, DARK, width=PHONE_PX)
    assert shown["dark"] is True and shown["width"] == PHONE_PX and shown["wider"] == []
    assert shown["text"][0] >= 4.5, shown["text"]
    assert shown["drawn"][0] >= 4.5, shown["drawn"]


def test_a_page_is_written_whole(found: PlanResult, explained: Explanation, tmp_path: Path) -> None:
    write_plan_report(tmp_path / "new" / "plan.html", found)
    explain.write_explain_report(tmp_path / "new" / "explain.html", explained)
    assert (tmp_path / "new" / "plan.html").read_text(encoding="utf-8") == plan.page(found)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["explain.html", "plan.html"]
