"""What people see of a sweep: a table in the terminal, and a page to sort, filter, compare and look closer."""

from __future__ import annotations

import io
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from batchsim.report.explore.columns import Column, swept_column, text_of
from batchsim.report.explore.details import MAX_DETAILS, detail_of, interesting
from batchsim.report.sweep import page, write_sweep_report
from batchsim.report.sweep_terminal import ROWS, print_sweep
from batchsim.report.sweep_words import columns_of, headline, number, span, warnings
from batchsim.sweep.result import SweepResult
from tests.browser import DARK, PHONE_PX, use
from tests.swept import REASON, SPEEDS, swept
from tests.test_report import References

GRID: dict[str, list[Any]] = {
    "max_num_seqs": [8, 16, 32, 64],
    "hardware": list(SPEEDS),
    "workload.request_rate": [4.0, 16.0],
}
PLOTLY_BYTES = 5_000_000
TOKENS, TTFT = "throughput_tokens_per_s", "latency_ms.ttft.p99"


@pytest.fixture(scope="module")
def result() -> SweepResult:
    return swept(GRID, failing=2)


def embedded(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="explored">(.*?)</script>', text)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def near(value: float | None) -> Any:
    return None if value is None else pytest.approx(value, rel=1e-6)


def printed(result: SweepResult, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_sweep(console, result)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def shaky(result: SweepResult) -> set[int]:
    """The rows in which the queue grows."""
    runs = [point["run"] for point in result.points]
    rows = [each["unstable"] for run in runs for each in (run["schedules"].values() if run else [{"unstable": None}])]
    return {index for index, unstable in enumerate(rows) if unstable is not None}


def without_requests(result: SweepResult) -> SweepResult:
    """As of training: no latencies, steps only."""
    points = json.loads(json.dumps(result.points))
    for point in points:
        point["cdf"] = {}
        for schedule in point["run"]["schedules"].values() if point["run"] else ():
            none = ("goodput_requests_per_s", "slo_attainment", "throughput_requests_per_s")
            schedule |= {"latency_ms": {}, "interval_90": {}} | dict.fromkeys(none)
    return SweepResult(result.name, result.fields, points)


def failed(reason: str, name: str = "nothing works") -> SweepResult:
    lost = {"hash": "0" * 64, "fields": {"max_num_seqs": 8}, "run": None, "error": reason, "cdf": {}, "window": {}}
    return SweepResult(name, ["max_num_seqs"], [lost])


def test_the_page_refers_to_nothing_outside_itself_and_is_the_same_every_time(
    result: SweepResult, tmp_path: Path
) -> None:
    write_sweep_report(tmp_path / "report.html", result)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    parser = References()
    parser.feed(text)
    assert parser.found == []
    assert "default-src 'none'" in text and "@import" not in text.partition("</style>")[0]
    assert text == page(swept(GRID, failing=2))


def test_a_page_of_a_thousand_points_stays_small_and_says_what_it_leaves_out() -> None:
    text = page(swept({"max_num_seqs": list(range(8, 108)), "workload.request_rate": [float(n) for n in range(1, 11)]}))
    assert len(text) - PLOTLY_BYTES < 10_000_000
    data = embedded(text)
    assert len(data["values"]["schedule"]) == 2_000
    assert len(data["details"]) == MAX_DETAILS
    assert f"Of 2,000 rows, this page has them of {MAX_DETAILS} only" in text


def test_texts_cannot_become_markup() -> None:
    evil = "</script><script>alert(1)</script><img src=x>"
    named = swept({"max_num_seqs": [8], evil: [evil, {"base": evil}]}, name=evil)
    for found in (named, failed(evil, evil)):
        assert evil not in page(found)


def test_rows_hold_what_the_points_do(result: SweepResult) -> None:
    data, rows = embedded(page(result)), result.rows()
    for key in ("max_num_seqs", "hardware", "schedule"):
        assert data["values"][key] == [row[key] for row in rows]
    for key in (TOKENS, TTFT):
        assert data["values"][key] == [near(row.get(key)) for row in rows]
    for side in ("low", "high"):
        assert data[side][TOKENS] == [near(row.get(f"{TOKENS}.{side}")) for row in rows]
    assert set(data["errors"].values()) == {REASON} and len(data["errors"]) == 2
    shown = data["details"]["0"]["cdf"]["ttft"]
    assert shown == [pytest.approx(each, rel=1e-4) for each in result.points[0]["cdf"]["sync"]["ttft"]]
    assert data["bounds"] == {"ttft": 500.0}
    assert data["steady"] == [index not in shaky(result) for index in range(len(rows))] and shaky(result)
    for index, row in enumerate(rows):
        expected = ["transferred"] * (row["hardware"] != "h200") + ["unstable"] * (index in shaky(result))
        assert data["marks"].get(str(index), []) == ([] if row["error"] else expected)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=400),
    st.lists(st.booleans(), min_size=400, max_size=400),
)
def test_the_rows_shown_close_up_are_the_best(values: list[tuple[int, int]], lost: list[bool]) -> None:
    columns = [Column("up", "up", better="high"), Column("down", "down", better="low")]
    rows: list[dict[str, Any]] = [
        {"up": up, "down": down, "error": "so" if gone else None}
        for (up, down), gone in zip(values, lost[: len(values)], strict=True)
    ]
    able = [index for index, row in enumerate(rows) if not row["error"]]
    first = able[-1:]
    found = interesting(rows, columns, first)
    assert len(found) == min(len(able), MAX_DETAILS) and set(found) <= set(able) and set(first) <= set(found)
    left = [index for index in able if index not in found]
    kept = [index for index in found if index not in first]
    if left and kept:
        # Every figure has had the same number of turns, and so half of those shown are its best.
        for key, sign in (("up", -1), ("down", 1)):
            ranked = sorted(able, key=lambda index: (sign * rows[index][key], index))
            assert set(ranked[: MAX_DETAILS // 2 - 1]) <= set(found)


def test_a_window_counts_from_the_end_of_a_forward(result: SweepResult) -> None:
    window = result.points[0]["window"]["sync"]
    found = detail_of({}, window)
    forwards = [bar for bar in found.bars if bar[1] == 2]
    assert min(start + length for *_, start, length in forwards) == 0
    assert sum(length for *_, length in found.bars) == sum(end - start for *_, start, end in window)
    for lane in range(4):
        spans = sorted((start, start + length) for _, on, _, start, length in found.bars if on == lane)
        assert all(after[0] >= before[1] for before, after in pairwise(spans))
    assert found.end_ns <= max(start + length for *_, start, length in found.bars)
    assert detail_of(None, []).bars == () and detail_of({"ttft": []}, None).to_json([])["cdf"] == {}


def test_a_sweep_of_failures_says_why() -> None:
    text = page(failed("so it is")).split("<body>")[1]
    assert "none could be simulated" in text and "1 of 1 points failed: so it is." in text
    assert 'id="explored"' not in text


def test_sentences_tell_what_was_swept_and_what_is_best(result: SweepResult) -> None:
    rows = result.rows()
    columns = columns_of(result.fields, rows)
    told = headline(len(result.points), columns, rows)
    best = max((row for row in rows if row["schedule"]), key=lambda row: row["goodput_requests_per_s"])
    assert told.startswith("24 points over max_num_seqs, hardware and request_rate, sync and async. Most goodput: ")
    assert f"max_num_seqs {best['max_num_seqs']}, hardware {best['hardware']}" in told
    warned = [text for text in warnings(result.points) if "extrapolated" in text]
    assert len(warned) == 1 and warned[0].endswith("(in 44 of 44 rows)")
    alone = swept({"max_num_seqs": [32]})
    assert headline(1, columns_of(alone.fields, alone.rows()), alone.rows()).startswith("1 point over max_num_seqs, ")


def test_values_of_fields_are_told_as_they_were_given() -> None:
    assert [text_of(value) for value in (3, 0.25, True, None, ["sync", "async"])] == [
        3,
        0.25,
        "true",
        None,
        "sync+async",
    ]
    assert text_of({"base": "h200", "sms": 66}) == "h200 sms=66"
    assert span([3, 1, None, 2, 2]) == "1, 2, 3"
    assert span([each / 8 for each in range(100)]) == "100 values from 0 to 12.375"
    assert span([f"h{n}" for n in range(10)]).endswith("h7 and 2 more")
    assert [number(value) for value in (12345.6, 345.67, 3.4567, 0.34567, 0.034567, 7.0, 12)] == [
        *("12,346", "345.7", "3.46", "0.346", "0.0346", "7", "12")
    ]
    keys = ["workload.rate", "slo.rate", "workload.length"]
    assert [swept_column(key, keys).label for key in keys] == ["workload.rate", "slo.rate", "length"]


@pytest.mark.parametrize("width", [50, 80, 140])
def test_the_terminal_shows_the_best_within_its_width(result: SweepResult, width: int) -> None:
    text = printed(result, width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    words = " ".join(text.split())
    for part in ("goodput", "2 of 24 points failed", f"The best {ROWS} of 44 rows by goodput, requests/s."):
        assert part in words
    goodput = sorted((row.get("goodput_requests_per_s", 0.0) for row in result.rows()), reverse=True)
    rule = next(number for number, line in enumerate(text.splitlines()) if line.startswith("───"))
    shown = text.splitlines()[rule + 1 :]
    found = [match[0] for line in shown[:ROWS] if (match := re.search(r"\b\d+\.\d\d\b", line))]
    assert found[:10] == [f"{each:.2f}" for each in goodput[:10]]
    assert ("tokens/s" in text.split("───")[0]) == (width >= 80)


def test_the_terminal_shows_sweeps_of_which_little_is_known(result: SweepResult) -> None:
    text = printed(without_requests(result), 80)
    assert "tokens/s" in text and "step mean" in text
    text = printed(failed("so it is"), 80)
    assert "none could be simulated" in text and "so it is" in text


def use_page(folder: Path, pages: dict[str, tuple[SweepResult, str]], *arguments: str, width: int = 1200) -> list[Any]:
    scripts = {}
    for name, (result, script) in pages.items():
        write_sweep_report(folder / f"{name}.html", result)
        scripts[folder / f"{name}.html"] = script
    return [answer["found"] for answer in use(folder, scripts, *arguments, width=width)]


SHOWN = "all('#rows tr').map(row => Number(row.dataset.row))"
USED = f"""
  const {{ frontier }} = document.documentElement.dataset;
  const found = {{ first: {SHOWN}, chosen: all("#chosen li").length, frontier }};
  const heading = key => document.querySelector(`th[data-key="${{key}}"]`);
  const press = key => click(heading(key).querySelector("button"));
  await press("{TTFT}");
  found.ascending = [{SHOWN}, heading("{TTFT}").getAttribute("aria-sort")];
  await press("{TTFT}");
  found.descending = [{SHOWN}, heading("{TTFT}").getAttribute("aria-sort"), all("th[aria-sort]").length];
  await press("hardware");
  found.words = {SHOWN};
  await change(document.getElementById("filter"), "async hardware=h200 ttft.p99<500", "input");
  found.filtered = [{SHOWN}, document.getElementById("count").textContent];
  await change(document.getElementById("filter"), "at most 256", "input");
  found.errors = [{SHOWN}, document.querySelector("td.failed").textContent];
  await change(document.getElementById("filter"), "unstable", "input");
  found.unstable = {SHOWN};
  await change(document.getElementById("filter"), "", "input");
  const lines = () => drawn("cumulative").filter(line => line.customdata).map(line => line.customdata[0]);
  found.lines = [lines()];
  for (const row of [1, 3, 5, 7]) await click(document.querySelector(`tr[data-row="${{row}}"] input`));
  found.lines.push(lines(), all("#rows tr.chosen").map(row => Number(row.dataset.row)).sort((a, b) => a - b));
  found.quantiles = drawn("cumulative").find(line => line.customdata?.[0] === 7).x;
  found.lanes = new Set(drawn("timeline").flatMap(stage => stage.y)).size;
  found.stages = drawn("timeline").map(stage => stage.name);
  await change(document.getElementById("latency"), "e2e");
  found.e2e = drawn("cumulative").find(line => line.customdata?.[0] === 7).x;
  await click(document.querySelector("#chosen button"));
  found.removed = lines();
  found.cells = [drawn("map")[0].z, drawn("map")[0].rows];
  await change(document.getElementById("map-value"), "{TTFT}");
  await change(document.getElementById("several"), "worst");
  found.worst = [drawn("map")[0].z, drawn("map")[0].rows, drawn("map")[0].reversescale];
  await change(document.getElementById("map-y"), "");
  found.plain = drawn("map").map(line => [line.type, line.name, line.x]);
  await change(document.getElementById("scatter-x"), "latency_ms.e2e.p99");
  found.axis = document.getElementById("scatter").layout.xaxis.title.text;
  return found;
"""


def test_a_browser_sorts_filters_compares_and_draws(result: SweepResult, tmp_path: Path) -> None:
    plain = "return { map: drawn('map').map(each => [each.type, each.name]), against: drawn('scatter')[0].x.length }"
    ranges = "return document.getElementById('map').layout.xaxis.ticktext"
    drawn = swept({"max_num_seqs": [n * 3 for n in range(3, 40)], "workload.request_rate": [3.7, 9.1]})
    found, training, hypercube = use_page(
        tmp_path,
        {
            "grid": (result, USED),
            "training": (without_requests(swept({"max_num_seqs": [8, 16, 32]})), plain),
            "hypercube": (drawn, ranges),
        },
    )
    rows = result.rows()
    able = [index for index, row in enumerate(rows) if row["schedule"]]

    def order(key: str, sign: int, some: list[int]) -> list[int]:
        return sorted(some, key=lambda index: (sign * rows[index][key], index))

    lost = [index for index in range(len(rows)) if index not in able]
    assert found["first"] == order("goodput_requests_per_s", -1, able) + lost
    assert found["ascending"] == [order(TTFT, 1, able) + lost, "ascending"]
    assert found["descending"] == [order(TTFT, -1, able) + lost, "descending", 1]
    names = [rows[index]["hardware"] for index in found["words"]]
    assert names == sorted(names)
    fits = [
        index
        for index in able
        if (rows[index]["schedule"], rows[index]["hardware"]) == ("async", "h200") and rows[index][TTFT] < 500
    ]
    assert fits and sorted(found["filtered"][0]) == fits
    assert found["filtered"][1] == f"{len(fits)} of {len(rows)} rows"
    assert found["errors"] == [lost, REASON]
    assert set(found["unstable"]) == shaky(result)

    steady = [index for index in able if index not in shaky(result)]
    front = [
        index
        for index in steady
        if not any(
            rows[other][TOKENS] >= rows[index][TOKENS] and rows[other][TTFT] <= rows[index][TTFT]
            for other in steady
            if (rows[other][TOKENS], rows[other][TTFT]) != (rows[index][TOKENS], rows[index][TTFT])
        )
    ]
    assert sorted(map(int, found["frontier"].split())) == front

    assert found["chosen"] == 2
    best = able.index(found["first"][0])
    assert found["lines"][0] == [able[best], able[best] - 1]
    # Five at once: the sixth pushes the oldest out.
    assert found["lines"][1] == [able[best] - 1, 1, 3, 5, 7]
    assert found["lines"][2] == sorted(found["lines"][1])
    point = result.points[rows[7]["point"]]
    for key, times in (("ttft", found["quantiles"]), ("e2e", found["e2e"])):
        assert times == [pytest.approx(each, rel=1e-4) for each in point["cdf"][rows[7]["schedule"]][key]]
    assert found["removed"] == [1, 3, 5, 7]
    assert found["lanes"] == 5 * 4
    assert {"decode", "build_inputs", "wait", "update"} <= set(found["stages"])

    for (cells, stands), key, choose in (
        (found["cells"], "goodput_requests_per_s", max),
        (found["worst"][:2], TTFT, max),
    ):
        wide = max(rows[index][key] for index in able) > 30 * min(rows[index][key] for index in able)
        for line, hardware in enumerate(GRID["hardware"]):
            for column, batch in enumerate(GRID["max_num_seqs"]):
                some = [i for i in able if (rows[i]["hardware"], rows[i]["max_num_seqs"]) == (hardware, batch)]
                if not some:
                    assert cells[line][column] is None
                    continue
                value = choose(rows[index][key] for index in some)
                assert rows[stands[line][column]][key] == value
                scaled = 10 ** cells[line][column] if cells[line][column] != pytest.approx(value) else value
                assert scaled == pytest.approx(value, rel=1e-5) and (wide or scaled == value)
    assert found["worst"][2] is True  # what is low is bright
    assert [[kind, name] for kind, name, _ in found["plain"]] == [["scatter", f"hardware={each}"] for each in SPEEDS]
    assert found["plain"][0][2] == GRID["max_num_seqs"]
    assert found["axis"] == "E2E p99, ms"

    assert training == {"map": [["scatter", "sync"], ["scatter", "async"]], "against": 3}
    assert len(hypercube) <= 8 and hypercube[0].startswith("9 to ") and hypercube[-1].endswith(" to 117")


LOOKS = """return {
  width: document.documentElement.scrollWidth, wider: wider(), text: contrast('body *:not(svg *)'),
  drawn: contrast('.plot text:not(.bartext):not(#map .textpoint text)'),
  dark: matchMedia('(prefers-color-scheme: dark)').matches, rows: all('#rows tr').length };
"""


@pytest.mark.parametrize(("width", "dark"), [(PHONE_PX, True), (1200, False)])
def test_the_page_can_be_read_on_a_phone_and_in_the_dark(
    result: SweepResult, tmp_path: Path, width: int, dark: bool
) -> None:
    (found,) = use_page(tmp_path, {"grid": (result, LOOKS)}, *([DARK] if dark else []), width=width)
    assert found["dark"] is dark
    assert found["width"] == width and found["wider"] == []
    assert found["text"][0] >= 4.5, found["text"]
    assert found["drawn"][0] >= 4.5, found["drawn"]
    assert found["rows"] == len(result.rows())
