"""Results as a notebook shows them: frames, figures, and a table of what matters most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchsim.errors import InputError, need_pandas, shown
from batchsim.refusal import choice
from batchsim.result import Run, ScheduleResult, figures

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from batchsim.tiles.result import CaseResult, TilesRun

# What the table of a run shows, as far as it has it; `frame` has everything.
_TABLE = (
    "throughput_tokens_per_s", "throughput_requests_per_s", "gain_over_sync", "goodput_requests_per_s",
    "slo_attainment", "latency_ms.ttft.p50", "latency_ms.ttft.p99", "latency_ms.tpot.p50", "latency_ms.tpot.p99",
    "latency_ms.e2e.p50", "latency_ms.e2e.p99", "step_ms.mean", "device_busy_fraction", "host_busy_fraction",
    "total_s", "to_target.hours",
)  # fmt: skip
_COLUMNS = 2


@dataclass(frozen=True, repr=False)
class RunView:
    """A simulated scenario as a notebook shows it; `run` holds all that is known of it."""

    run: Run

    @property
    def results(self) -> dict[str, ScheduleResult]:
        """The result of each schedule; `batchsim.result.DEFINITIONS` says what its figures mean."""
        return self.run.results

    @property
    def sentences(self) -> list[str]:
        """What came out and why, and what makes it doubtful."""
        from batchsim.report.words import alerts, causes, headline, unique_warnings

        return [headline(self.run), *causes(self.run), *alerts([self.run]), *unique_warnings([self.run])]

    def frame(self) -> pd.DataFrame:
        """A row for each schedule; each figure has a column, and two for its 90% interval: `.low` and `.high`."""
        need_pandas()
        import pandas as pd

        rows = {name: _with_bounds(result) for name, result in self.results.items()}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("schedule")

    def figure(self) -> go.Figure:
        """What tells most: latencies where requests differ or arrive over time, else where the device's time goes."""
        from batchsim.report.shown import varied

        return self.latencies() if varied(self.run) and self._distributions() else self.idle()

    def timeline(self, *, close_up: bool = False) -> go.Figure:
        """A few steady steps of each schedule, lane by lane; `close_up`: what happens between two forwards."""
        from batchsim.report.figures import on_white, timelines

        return on_white(timelines(self.run, None)["close-up" if close_up else "timeline"])

    def idle(self) -> go.Figure:
        """Where the device's time goes: busy, and idle by the stage that it waits for."""
        from batchsim.report.figures import idle, on_white

        return on_white(idle(self.run, None))

    def latencies(self, *names: str) -> go.Figure:
        """Cumulative distributions of the requests' latencies: of `names` (ttft, tpot, itl, e2e, queue), or of all.

        Raises:
            InputError: the run has no such latency.
        """
        found = self._distributions()
        for name in names or ([] if found else ["latencies"]):
            if name not in found:
                wanted = choice(name, list(found)) if found else "requests: those of this run have no latencies"
                raise InputError("latencies()", "", shown(name), wanted)
        return panels({name: found[name] for name in names or found})

    def _distributions(self) -> dict[str, go.Figure]:
        from batchsim.report.serving import sections

        prefix = "latency-"
        plots, _ = sections(self.run, None)
        return {
            name.removeprefix(prefix): plot
            for name, plot in plots.items()
            if name.startswith(prefix) and plot.data[0].type == "scatter"
        }

    def __repr__(self) -> str:
        return f"<RunView {self.run.scenario.get('name')!r}>\n" + "\n".join(self.sentences)

    def _repr_html_(self) -> str:
        from batchsim.report.shown import LATENCY_METRICS, METRICS, REQUEST_METRICS

        metrics = {metric.key: metric for metric in (*METRICS, *REQUEST_METRICS, *LATENCY_METRICS)}
        rows = []
        for key in _TABLE:
            cells = [_cell(metrics[key].format, result, key) for result in self.results.values()]
            rows += [[metrics[key].label, *cells]] if any(cells) else []
        return _html(str(self.run.scenario.get("name", "")), self.sentences, ["", *self.results], rows)


@dataclass(frozen=True, repr=False)
class TilesView:
    """Chains of kernels under every way to synchronise their tiles; `run` holds all that is known of them."""

    run: TilesRun

    @property
    def cases(self) -> tuple[CaseResult, ...]:
        """Each chain on each size of input, in the scenario's order."""
        return self.run.cases

    @property
    def sentences(self) -> list[str]:
        """Of each case, what is chosen and why."""
        from batchsim.tiles.terminal import headline

        return [f"{case.name}: {headline(case)} {case.why}" for case in self.cases]

    def frame(self) -> pd.DataFrame:
        """A row for each case and policy; `batchsim.tiles.result.DEFINITIONS` says what the figures mean."""
        need_pandas()
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "case": case.name, "policy": each.policy, "chosen": each is case.chosen, "time_us": each.time_us,
                    "gain": each.gain, "waves": each.waves, "utilisation": each.utilisation, "tiling": each.tiling,
                }
                for case in self.cases
                for each in case.policies
            ]
        )  # fmt: skip

    def tiles(self, case: int = 0) -> pd.DataFrame:
        """A row for each tile of the picture of a case: where it ran, from when to when, and how long it waited."""
        need_pandas()
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "policy": told.policy.name, "kernel": told.policy.chain.kernels[span.kernel].name, "row": span.row,
                    "col": span.col, "slice": span.slice, "sm": span.sm, "slot": span.slot,
                    "start_us": span.start_ns / 1e3, "end_us": span.end_ns / 1e3,
                    "waiting_us": sum(end - start for start, end in span.waits) / 1e3,
                }
                for told in self.cases[case].runs
                for span in told.run.spans
            ]
        )  # fmt: skip

    def figure(self, case: int = 0) -> go.Figure:
        """The multiprocessors over time in a case: StreamSync, and below it the policy that is chosen."""
        from batchsim.report.figures import on_white
        from batchsim.tiles.picture import picture

        return on_white(picture(self.cases[case].runs, self.cases[case].device.sms))

    def __repr__(self) -> str:
        return f"<TilesView {self.run.scenario.get('name')!r}>\n" + "\n".join(self.sentences)

    def _repr_html_(self) -> str:
        head = ["case", "policy", "time, \N{MICRO SIGN}s", "gain", "waves", "utilisation", "tiling"]
        rows = [
            [
                case.name, each.policy + (" (chosen)" if each is case.chosen else ""), f"{each.time_us:,.1f}",
                f"{each.gain:+.1%}", f"{each.waves:.2f}", f"{each.utilisation:.1%}", each.tiling,
            ]
            for case in self.cases
            for each in case.policies
        ]  # fmt: skip
        return _html(str(self.run.scenario.get("name", "")), self.sentences, head, rows)


def panels(plots: Mapping[str, go.Figure]) -> go.Figure:
    """Several figures of one kind as one, two abreast, with one legend."""
    from plotly.subplots import make_subplots

    from batchsim.report.figures import on_white

    columns = min(len(plots), _COLUMNS)
    rows = -(-len(plots) // columns)
    figure = make_subplots(rows=rows, cols=columns, horizontal_spacing=0.1, vertical_spacing=0.28 / rows)
    named: set[str] = set()
    for number, plot in enumerate(plots.values()):
        place = {"row": number // columns + 1, "col": number % columns + 1}
        for trace in plot.data:
            trace.showlegend = trace.showlegend is not False and trace.name not in named
            named.add(trace.name)
            figure.add_trace(trace, **place)
        figure.update_xaxes(plot.layout.xaxis.to_plotly_json(), **place)
        figure.update_yaxes(plot.layout.yaxis.to_plotly_json(), **place)
    first = next(iter(plots.values())).layout
    figure.update_layout(
        template=None, height=rows * first.height, font=first.font, legend=first.legend, margin=first.margin,
        hoverlabel=first.hoverlabel,
    )  # fmt: skip
    return on_white(figure)


def _with_bounds(result: ScheduleResult) -> dict[str, float]:
    """All figures, each followed by the bounds of its interval."""
    flat: dict[str, float] = {}
    for key, value in figures(result).items():
        flat[key] = value
        if key in result.interval_90:
            flat[f"{key}.low"], flat[f"{key}.high"] = result.interval_90[key]
    return flat


def _cell(form: str, result: ScheduleResult, key: str) -> str:
    """A figure, and from where to where its interval goes; empty where there is none."""
    from batchsim.report.shown import shown

    value, bounds = shown(result).get(key), result.interval_90.get(key)
    if value is None:
        return ""
    told = format(value, form)
    return told if bounds is None else f"{told} ({format(bounds[0], form)} to {format(bounds[1], form)})"


def _html(title: str, sentences: Iterable[str], head: list[str], rows: Iterable[list[str]]) -> str:
    from batchsim.report.html import escaped, items

    first, *others = sentences
    body = "".join("<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f"<h4>{escaped(title)}</h4><p>{escaped(first)}</p><ul>{items(others)}</ul><table><thead><tr>"
        f"{''.join(f'<th>{escaped(each)}</th>' for each in head)}</tr></thead><tbody>{body}</tbody></table>"
    )
