"""Open-loop validation: execute serving scenarios at several loads, predict them again, and tell how far off that is.

python -m calibration.serving run calibration/validation/serving/points.yaml --device cuda
python -m calibration.serving predict calibration/validation/serving
python -m calibration.serving table calibration/validation/serving
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from batchsim.files import write_json
from batchsim.profile import load_profile
from batchsim.scenario import Scenario
from batchsim.yaml_loader import load as load_yaml
from calibration.points import PROFILES, Folder, execute, read_points, stage_errors
from calibration.predict import predict_again

LATENCIES = ("ttft", "tpot", "e2e")
HEADER = """\
| point | schedule | busy | tokens/s | TTFT p50, ms | p99 | TPOT p50, ms | E2E p50, ms | p99 | queue |
|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def scenarios(path: Path) -> dict[str, Scenario]:
    """The scenarios of a points file by name, in the file's order; each entry over the file's defaults."""
    document = load_yaml(path).data
    found: dict[str, Scenario] = {}
    for entry in document["points"]:
        point = {**document["defaults"], **entry}
        found[point["name"]] = Scenario(kind="serving", profile=PROFILES[point["model"]], **point)
    return found


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="A list of points, YAML.")],
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    out: Annotated[Path | None, typer.Option(help="Folder for one JSON a point; default: the list's own.")] = None,
    repeats: Annotated[int, typer.Option(help="Executions of each schedule.")] = 1,
    only: Annotated[str, typer.Option(help="Only points whose name starts so.")] = "",
) -> None:
    """Execute and predict every point, and write one JSON object a point; points already there are kept."""
    wanted = {name: scenario for name, scenario in scenarios(file).items() if name.startswith(only)}
    for path, point in execute(wanted, out or file.parent, device, repeats):
        _keep(path, point)


@app.command()
def predict(folder: Folder) -> None:
    """Predict every point in `folder` again, at the host's speed beside its execution; keep what was measured."""
    for path, point in read_points(folder).items():
        _keep(path, predict_again(point, load_profile(point["profile"])))


@app.command()
def table(folder: Folder) -> None:
    """Print the errors of all points in `folder`, and a summary above them, as Markdown."""
    points = list(read_points(folder).values())
    for line in summary(points):
        typer.echo(line)
    typer.echo("")
    typer.echo(HEADER)
    for point in points:
        for schedule in point["measured"]:
            typer.echo(_row(point, schedule))


def summary(points: Sequence[dict[str, Any]]) -> list[str]:
    """How far the predictions are from the executions, over all points and schedules, a line a figure."""
    errors = [error for point in points for error in point["error"].values()]

    def told(name: str, key: str) -> str:
        found = np.array([error[key] for error in errors]) * 100
        return (
            f"{name}: median error {np.median(np.abs(found)):.2f}% (signed {np.median(found):+.2f}%), "
            f"worst {found[np.argmax(np.abs(found))]:+.1f}%"
        )

    lines = [f"{len(errors)} runs of {len(points)} points, none of them fitted to."]
    lines.append(told("Tokens/s", "throughput_tokens_per_s"))
    for statistic in ("mean", "p50", "p99"):
        lines += [told(f"{name.upper()} {statistic}", f"latency_ms.{name}.{statistic}") for name in LATENCIES]
        together = np.abs([error[f"latency_ms.{name}.{statistic}"] for error in errors for name in LATENCIES]) * 100
        lines.append(f"TTFT, TPOT and E2E {statistic} together: median error {np.median(together):.2f}%")
    stages = ", ".join(
        f"{stage} {np.median(found):+.1f} ({found[np.argmax(np.abs(found))]:+.1f})"
        for stage, found in sorted(stage_errors(points).items())
    )
    lines.append(f"Stages, median (and largest) signed error in % of a mean step: {stages}")
    queue = np.array([_queue_error(point, schedule) for point in points for schedule in point["measured"]])
    largest = queue[np.argmax(np.abs(queue))]
    lines.append(f"Queue, mean, in % of the mean TTFT: median {np.median(queue):+.1f}, largest {largest:+.1f}")
    return lines


def _queue_error(point: dict[str, Any], schedule: str) -> float:
    predicted, measured = (point[side][schedule]["latency_ms"] for side in ("predicted", "measured"))
    return float((predicted["queue"]["mean"] - measured["queue"]["mean"]) / measured["ttft"]["mean"] * 100)


def _keep(path: Path, point: dict[str, Any]) -> None:
    """Write a point, and say how far off its prediction is."""
    write_json(path, point)
    for schedule, error in point["error"].items():
        told = ", ".join(
            f"{name} {statistic} {error[f'latency_ms.{name}.{statistic}']:+.1%}"
            for name in LATENCIES
            for statistic in ("p50", "p99")
        )
        typer.echo(f"{path.stem} {schedule}: tokens/s {error['throughput_tokens_per_s']:+.1%}, {told}")


def _row(point: dict[str, Any], schedule: str) -> str:
    measured, error = point["measured"][schedule], point["error"][schedule]
    latency = measured["latency_ms"]

    def cell(name: str, statistic: str) -> str:
        return f"{latency[name][statistic]:,.1f} {error[f'latency_ms.{name}.{statistic}']:+.1%}"

    cells = [
        point["scenario"]["name"],
        schedule,
        f"{measured['device_busy_fraction']:.0%}",
        f"{measured['throughput_tokens_per_s']:,.0f} {error['throughput_tokens_per_s']:+.1%}",
        cell("ttft", "p50"), cell("ttft", "p99"), cell("tpot", "p50"), cell("e2e", "p50"), cell("e2e", "p99"),
        f"{_queue_error(point, schedule):+.1f} pt",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(app())
