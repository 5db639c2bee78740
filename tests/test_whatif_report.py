"""What people see of `batchsim whatif`: a table and bars in the terminal, and a page that stands alone."""

from __future__ import annotations

import io
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from batchsim.learned import LearnedProfile
from batchsim.report import whatif_figures as draw
from batchsim.report.learned import print_learned
from batchsim.report.whatif import page, write_whatif
from batchsim.report.whatif_terminal import print_whatif
from batchsim.report.whatif_words import headline, how, ms
from batchsim.whatif import Answer, whatif
from batchsim.whatif.timeline import write_predicted
from calibration.kineto import read_trace
from calibration.learn import learn
from tests.test_report import BROWSERS, References, dumped
from tests.traces_kineto import TracedLoop

STEADY_MS = 3.6


def learned(folder: Path, loop: TracedLoop) -> LearnedProfile:
    return learn(read_trace(loop.write(folder / "loop.json")))


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> Answer:
    return whatif(learned(tmp_path_factory.mktemp("loop"), TracedLoop()), STEADY_MS)


@pytest.fixture(scope="module")
def overlapped(answer: Answer, tmp_path_factory: pytest.TempPathFactory) -> Answer:
    """Of the loop that was made asynchronous."""
    path = tmp_path_factory.mktemp("async") / "async.json"
    write_predicted(path, answer, ["async"])
    return whatif(learn(read_trace(path)), answer.schedules["async"].step_ms)


def printed(answer: Answer, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_whatif(console, answer)
    print_learned(console, answer.profile)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_terminal_shows_the_loop_as_it_is_first(answer: Answer, overlapped: Answer) -> None:
    for each, first in ((answer, "sync"), (overlapped, "async")):
        lines = printed(each).splitlines()
        rows = [line.split() for line in lines if re.match(r"(▶|  ?) ?[\w.]+\s+[\d,.]+\s+[\d,.]+ to ", line)]
        assert rows[0][:2] == ["▶", first]
        assert {row[-1] for row in rows} <= {"device", "host", "turns"}
        assert sorted(row[0] for row in rows[1:]) == sorted(set(each.schedules) - {first})


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_shows_all_within_its_width(answer: Answer, overlapped: Answer, width: int) -> None:
    for each in (answer, overlapped):
        text = printed(each, width)
        assert max(len(line) for line in text.splitlines()) <= width
        assert "…" not in text
        words = " ".join(text.split())
        assert all(" ".join(sentence.split()) in words for sentence in each.sentences)


def test_bars_are_as_long_as_steps(answer: Answer) -> None:
    bars = re.findall(r"([\w.]+) +(█+)(▓*)(░*) ([\d.,]+)", printed(answer))
    assert [name for name, *_ in bars] == list(answer.schedules)
    longest = max(each.step_ms_interval[1] for each in answer.schedules.values())
    for name, low, middle, high, value in bars:
        found = answer.schedules[name]
        cells = [len(low), len(low + middle), len(low + middle + high)]
        expected = (found.step_ms_interval[0], found.step_ms, found.step_ms_interval[1])
        assert cells == pytest.approx([each / longest * 48 for each in expected], abs=0.51)
        assert value == ms(found.step_ms)


def test_the_headline_says_which_way_it_goes(answer: Answer, overlapped: Answer) -> None:
    assert headline(answer).startswith("Async is faster: 3.6 → ")
    assert headline(overlapped).startswith("The loop is asynchronous already; sync would take ")
    schedules = answer.schedules
    for gain, words in ((-0.05, "Async loses: "), (0.004, "Async gives next to nothing: ")):
        changed = schedules | {"async": replace(schedules["async"], throughput_gain=gain)}
        assert headline(replace(answer, schedules=changed)).startswith(words)


def test_how_the_numbers_came_about_follows_what_was_known(answer: Answer) -> None:
    profile = answer.profile
    told = dict(how(answer))
    assert "more than without a profiler (3.6 ms)" in told["profiler"]
    assert "host timers" not in told
    blind = dict(how(whatif(profile)))
    assert "was not given (--steady-step-ms)" in blind["profiler"]
    timed = dict(how(whatif(profile.model_copy(update={"phases_ms": {"build": 0.4}}), STEADY_MS)))
    assert timed["host timers"].endswith("0.4 ms a step in all: build 0.4.")


def test_the_page_refers_to_nothing_outside_itself_and_is_the_same_every_time(answer: Answer, tmp_path: Path) -> None:
    write_whatif(tmp_path / "a.html", answer)
    text = (tmp_path / "a.html").read_text()
    parser = References()
    parser.feed(text)
    assert parser.found == []
    assert "default-src 'none'" in text and "@import" not in text.partition("</style>")[0]
    assert text == page(answer)
    assert 4_000_000 < len(text) < 6_000_000  # plotly.js once


def test_names_of_a_trace_cannot_become_markup(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    trace = TracedLoop(device=evil).write(tmp_path / "loop.json")
    trace.write_text(trace.read_text().replace('"build"', f'"{evil}"'))
    profile = learn(read_trace(trace)).model_copy(update={"source": evil, "notes": [evil]})
    assert evil in profile.phases and profile.device == evil
    assert evil not in page(whatif(profile, STEADY_MS))


def test_timelines_show_work_where_it_is(answer: Answer) -> None:
    """Bars of a lane lie apart, those of the host have no gap, and async's device has none either."""
    lanes: dict[float, list[tuple[float, float]]] = {}
    figure = draw.timelines(answer)
    for trace in figure.data:
        for start, length, position in zip(trace.base, trace.x, trace.y, strict=True):
            lanes.setdefault(position, []).append((start, start + length))
    labels = dict(zip(figure.layout.yaxis.tickvals, figure.layout.yaxis.ticktext, strict=True))
    hosts = [position for position, label in labels.items() if label.strip() == "host"]
    assert len(hosts) == 3  # measured, sync, async
    for position, spans in lanes.items():
        spans.sort()
        for before, after in pairwise(spans):
            assert after[0] >= before[1] - 1e-6
            if position in hosts:
                assert after[0] == pytest.approx(before[1], abs=1e-5)
    ends = [lanes[position][-1][1] for position in hosts]
    now, other = answer.schedules["sync"].step_ms, answer.schedules["async"].step_ms
    assert ends == [pytest.approx(3 * each, rel=0.03) for each in (TracedLoop().step_us / 1e3, now, other)]


def test_exposed_work_adds_up(answer: Answer) -> None:
    figure = draw.exposed(answer)
    totals = dict.fromkeys(answer.schedules, 0.0)
    for trace in figure.data:
        for name, value in zip(trace.y, trace.x, strict=True):
            totals[name] += value
    for name, found in answer.schedules.items():
        assert totals[name] == pytest.approx(sum(found.exposed_ms.values()))


def test_many_phases_share_the_colour_of_others(answer: Answer) -> None:
    found = answer.schedules["sync"]
    moments = tuple(
        moment._replace(what=f"phase {i % 40}") if moment.what in ("build", "update", "launch") else moment
        for i, moment in enumerate(found.moments)
    )
    many = replace(answer, schedules=answer.schedules | {"sync": replace(found, moments=moments)})
    host, _ = draw.legend(many)
    assert draw.OTHERS in host
    assert len(host) <= 14
    draw.timelines(many)


def test_one_step_is_enough_for_a_page(answer: Answer) -> None:
    page(whatif(answer.profile.model_copy(update={"steps": answer.profile.steps[:1]}), STEADY_MS))


def test_a_browser_draws_every_figure(answer: Answer, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser found: looked for {', '.join(BROWSERS)}")
    write_whatif(tmp_path / "report.html", answer)
    dom = dumped(browser, tmp_path / "report.html", tmp_path)
    root = re.search(r"<html[^>]*>", dom)
    assert root is not None and "data-error" not in root[0] and 'data-rendered="3"' in root[0]
    for figure in ("steps", "timelines", "exposed"):
        assert re.search(rf'id="{figure}"[^>]*js-plotly-plot|js-plotly-plot[^>]*id="{figure}"', dom), figure
    assert dom.count('<g class="point">') > 60
