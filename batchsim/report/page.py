"""The page for the browser: everything in one file, plotly.js included, and nothing fetched from anywhere."""

from __future__ import annotations

from batchsim.report import figures as draw
from batchsim.report import serving
from batchsim.report.html import as_yaml, definitions, document, escaped, header, items, plot, section
from batchsim.report.shown import (
    LATENCY_METRICS,
    METRICS,
    REQUEST_METRICS,
    Metric,
    definitions_of,
    error_text,
    interval_text,
    shown,
    stage_label,
    unit,
    varied,
)
from batchsim.report.words import (
    NEGLIGIBLE_GAIN,
    agreement,
    alerts,
    causes,
    effort,
    headline,
    idle_shares,
    unique_warnings,
)
from batchsim.result import DEFINITIONS, Run, ScheduleResult, errors, figures

_TIMELINE_NOTE = (
    "A few steps of the steady run, aligned where a forward ends. Blank is idle, hatched is waiting. "
    "Drag to zoom, double-click to go back."
)
_CLOSE_UP_NOTE = "What happens between the end of a forward and the host's next wait: the cause of idle time."
_ON_CARDS = (
    "step_ms.mean",
    "step_ms.p99",
    "device_busy_fraction",
    "launch_gap_fraction",
    "host_busy_fraction",
    "total_s",
    "to_target.hours",
)
_ON_CARDS_OF_REQUESTS = (
    "throughput_requests_per_s",
    "goodput_requests_per_s",
    "slo_attainment",
    "latency_ms.ttft.p50",
    "latency_ms.ttft.p99",
    "latency_ms.tpot.p50",
    "latency_ms.e2e.p50",
    "latency_ms.e2e.p99",
    "device_busy_fraction",
    "host_busy_fraction",
)


def page(predicted: Run, measured: Run | None = None) -> str:
    """The HTML text of the report."""
    runs = [predicted] if measured is None else [predicted, measured]
    name = str(predicted.scenario.get("name", "scenario"))
    plots, sections = serving.sections(predicted, measured) if varied(predicted) else ({}, [])
    plots |= draw.timelines(predicted, measured) | {"idle": draw.idle(predicted, measured)}
    if measured is not None:
        plots["metric-errors"] = draw.metric_errors(predicted, measured)
        plots["stage-errors"] = draw.stage_errors(predicted, measured)
    sections += [
        section("Timeline", _TIMELINE_NOTE, plot("timeline")),
        section("Close-up of one turn", _CLOSE_UP_NOTE, plot("close-up")),
        section("Where the device's time goes", DEFINITIONS["idle_ns"].capitalize() + ".", plot("idle")),
    ]
    if measured is not None:
        side_by_side = f'<div class="pair">{plot("metric-errors")}{plot("stage-errors")}</div>'
        sections.append(section("Predicted against measured", agreement(predicted, measured), side_by_side))
    sections += [
        section("All figures", " ".join(f"{line}." for line in effort(predicted)), _figures_table(predicted, measured)),
        section("Definitions", "", definitions(definitions_of(predicted))),
        section("Scenario", "", as_yaml(predicted.scenario)),
        section("Provenance", "", "".join(f"<h3>{escaped(run.source)}</h3>{as_yaml(run.provenance)}" for run in runs)),
    ]
    top = header(name, headline(predicted, measured), causes(measured or predicted))
    told = _list("alerts", alerts(runs)) + _list("warnings", unique_warnings(runs))
    return document(name, [top, told, _cards(predicted, measured), *sections], plots)


def _list(kind: str, texts: list[str]) -> str:
    return f'<ul class="{kind}">{items(texts)}</ul>' if texts else ""


def _cards(predicted: Run, measured: Run | None) -> str:
    return f'<div class="cards">{"".join(_card(name, predicted, measured) for name in predicted.results)}</div>'


def _card(name: str, predicted: Run, measured: Run | None) -> str:
    result = predicted.results[name]
    found = shown(result)
    truth = shown(measured.results[name]) if measured is not None and name in measured.results else {}
    error = errors(result, measured.results[name]) if measured is not None and truth else {}
    chip = ""
    if result.gain_over_sync is not None and name != "sync":
        gain = result.gain_over_sync
        kind = "gain" if gain >= NEGLIGIBLE_GAIN else "same" if gain > -NEGLIGIBLE_GAIN else "loss"
        chip = f'<span class="chip {kind}">{gain:+.1%} against sync</span>'
    rows = [
        f"<dt>{escaped(metric.label)}</dt><dd>{_value(metric, found, truth, error)}</dd>"
        for metric in _on_cards(predicted)
        if metric.key in found
    ]
    predicted_mark = " predicted" if truth else ""
    tokens = f'<p class="big">{result.throughput:,.0f} <small>{unit(result)}{predicted_mark}</small></p>'
    if truth:
        key = result.throughput_key
        by = f", {truth['gain_over_sync']:+.1%} against sync" if chip and "gain_over_sync" in truth else ""
        tokens += f'<p class="measured">measured {truth[key]:,.0f}{by} (error {error_text(key, error[key])})</p>'
    busy = min(max(result.device_busy_fraction, 0.0), 1.0)
    meter = f'<div class="meter" title="device busy {busy:.1%}"><i style="width:{busy * 100:.2f}%"></i></div>'
    return f'<article class="card"><h3>{escaped(name)} {chip}</h3>{tokens}{meter}<dl>{"".join(rows)}</dl></article>'


def _on_cards(run: Run) -> list[Metric]:
    metrics = {metric.key: metric for metric in (*METRICS, *REQUEST_METRICS, *LATENCY_METRICS)}
    return [metrics[key] for key in (_ON_CARDS_OF_REQUESTS if varied(run) else _ON_CARDS)]


def _value(metric: Metric, found: dict[str, float], truth: dict[str, float], error: dict[str, float]) -> str:
    text = _number(found.get(metric.key), metric.format)
    if metric.key in truth and metric.key in error:
        text += f" <small>{escaped(error_text(metric.key, error[metric.key]))}</small>"
    return text


def _number(value: float | None, form: str) -> str:
    return "&ndash;" if value is None else format(value, form)


def _figures_table(predicted: Run, measured: Run | None) -> str:
    """Every figure of every schedule: predicted, or predicted, measured and error."""
    columns = list(predicted.results)
    kinds = ("predicted", "measured", "error") if measured is not None else ("",)
    head = "".join(f'<th colspan="{len(kinds)}">{escaped(name)}</th>' for name in columns)
    under = "".join(f"<th>{kind}</th>" for _ in columns for kind in kinds) if measured is not None else ""
    rows = [f'<tr><th rowspan="{1 + bool(under)}"></th>{head}</tr>' + (f"<tr>{under}</tr>" if under else "")]
    for title, metrics in _groups(predicted, measured):
        rows.append(f'<tr class="group"><th colspan="{1 + len(columns) * len(kinds)}">{escaped(title)}</th></tr>')
        for metric in metrics:
            cells = "".join(_cells(metric, name, predicted, measured) for name in columns)
            rows.append(f"<tr><th>{escaped(metric.label)}</th>{cells}</tr>")
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def _groups(predicted: Run, measured: Run | None) -> list[tuple[str, list[Metric]]]:
    results = [result for run in (predicted, measured) if run is not None for result in run.results.values()]
    keys = dict.fromkeys(key for result in results for key in figures(result))
    stages = [key.removeprefix("stage_ms.") for key in keys if key.startswith("stage_ms.")]
    idle = dict.fromkeys(stage for result in results for stage in idle_shares(result))
    counts = dict.fromkeys(key for result in results for key in _counts(result))
    requests = (("Requests", REQUEST_METRICS), ("Latency of requests", LATENCY_METRICS)) if varied(predicted) else ()
    return [
        ("Metrics", [metric for metric in METRICS if metric.key in keys]),
        *((title, found) for title, all_ in requests if (found := [metric for metric in all_ if metric.key in keys])),
        ("Time of a step by stage, ms", [Metric(f"stage_ms.{s}", stage_label(s), ",.4f") for s in stages]),
        ("Device idle for, share of total", [Metric(f"idle.{s}", stage_label(s), ".3%") for s in idle]),
        ("Counts", [Metric(f"counts.{key}", key.replace("_", " "), ",d") for key in counts]),
    ]


def _cells(metric: Metric, name: str, predicted: Run, measured: Run | None) -> str:
    left = _all_figures(predicted.results[name])
    width = interval_text(predicted.results[name], metric) if metric.key in left else ""
    cells = [_number(left.get(metric.key), metric.format) + (f" <small>{width}</small>" if width else "")]
    if measured is not None:
        truth = measured.results.get(name)
        right = _all_figures(truth) if truth is not None else {}
        error = errors(predicted.results[name], truth).get(metric.key) if truth and metric.key in left else None
        if metric.key.startswith("idle.") and metric.key in left and metric.key in right:
            error = (left[metric.key] - right[metric.key]) * 100
            text = error_text("idle_fraction", error)
        else:
            text = "&ndash;" if error is None else error_text(metric.key, error)
        cells += [_number(right.get(metric.key), metric.format), text]
    return "".join(f"<td>{cell}</td>" for cell in cells)


def _all_figures(result: ScheduleResult) -> dict[str, float]:
    idle = {f"idle.{stage}": share for stage, share in idle_shares(result).items()}
    return shown(result) | idle | {f"counts.{key}": value for key, value in _counts(result).items()}


def _counts(result: ScheduleResult) -> dict[str, int]:
    return result.counts | result.outcomes
