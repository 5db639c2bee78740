"""Virtual speed-ups as a picture."""

from __future__ import annotations

import plotly.graph_objects as go

from batchsim.explain.result import Explanation
from batchsim.explain.sentences import measure_words
from batchsim.report.figures import ACROSS, layout


def gains_figure(found: Explanation) -> go.Figure:
    """A bar for each stage and schedule, the stage that helps any schedule most on top."""
    figure = go.Figure()
    most: dict[str, float] = {}
    for each in found.schedules.values():
        for gain in each.gains:
            most[gain.stage] = max(most.get(gain.stage, 0.0), gain.at(each.measure))
    stages = sorted(most, key=lambda stage: most[stage])
    for i, (name, each) in enumerate(found.schedules.items()):
        gains = {gain.stage: gain.at(each.measure) * 100 for gain in each.gains}
        figure.add_bar(
            name=name, orientation="h", y=stages, x=[gains.get(stage) for stage in stages],
            marker={"color": ACROSS[i % len(ACROSS)]}, hovertemplate="%{y}: %{x:+.2f}%<extra>" + name + "</extra>",
        )  # fmt: skip
    measures = {measure_words(each.measure) for each in found.schedules.values()}
    figure.update_layout(**layout(height=140 + 26 * len(stages)), barmode="group")
    figure.update_xaxes(title=f"gain in {' or '.join(sorted(measures))}, %")
    return figure
