"""Validation points: execute a list of them, predict them again, and make the README's table from what was found.

python -m calibration.points run calibration/validation/points.yaml --device cuda
python -m calibration.points predict calibration/validation
python -m calibration.points table calibration/validation
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from batchsim.files import write_json
from batchsim.profile import Profile, load_profile
from batchsim.result import ScheduleResult, occurrence, validation_json
from batchsim.scenario import Scenario
from batchsim.workload_scenario import FixedWorkload
from batchsim.yaml_loader import load as load_yaml
from calibration.predict import predict_again

PROFILES = {
    "llama-3.2-1b": "h200-llama-3.2-1b",
    "llama-3.2-3b": "h200-llama-3.2-3b",
    "llama-3.1-8b": "h200-llama-3.1-8b",
}

HEADER = """\
| point | sync tokens/s | error | async tokens/s | error | busy sync | error | busy async | error | gain | predicted |
|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"""

Folder = Annotated[Path, typer.Argument(help="Folder of points.")]
Profiles = Annotated[Path | None, typer.Option(help="Folder of profiles in place of the shipped ones.")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def scenarios(path: Path) -> dict[str, Scenario]:
    """The scenarios of a points file by name, `8b-b32-i256-o1024` and so on; executed in the file's order."""
    document = load_yaml(path).data
    found: dict[str, Scenario] = {}
    for entry in document["points"]:
        point = {**document["defaults"], **entry}
        batch = point.pop("batch")
        lengths = {"input_len": point.pop("input_len"), "output_len": point.pop("output_len")}
        prompts = point.pop("num_prompts", batch)
        name = f"{point['model'].split('-')[-1]}-b{batch}-i{lengths['input_len']}-o{lengths['output_len']}"
        name += "" if prompts == batch else f"-n{prompts}"
        name += "" if point["cuda_graphs"] else "-nograph"
        found[name] = Scenario(
            kind="serving",
            name=name,
            profile=PROFILES[point["model"]],
            workload=FixedWorkload(kind="fixed", num_prompts=prompts, **lengths),
            max_num_seqs=batch,
            **point,
        )
    return found


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="A list of points, YAML.")],
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    out: Annotated[Path | None, typer.Option(help="Folder for one JSON a point; default: the list's own.")] = None,
    repeats: Annotated[int, typer.Option(help="Executions of each schedule.")] = 3,
    profiles: Profiles = None,
    only: Annotated[str, typer.Option(help="Only points whose name starts so.")] = "",
) -> None:
    """Execute and predict every point, and write one JSON object a point; points already there are kept."""
    wanted = {name: scenario for name, scenario in scenarios(file).items() if name.startswith(only)}
    for path, point in execute(wanted, out or file.parent, device, repeats, profiles):
        _keep(path, point)


def execute(
    wanted: Mapping[str, Scenario], folder: Path, device: str, repeats: int, profiles: Path | None = None
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Execute and predict scenarios by name: the path of each one's point in `folder`, and the point, where none is."""
    from calibration.validate import Bench, validate

    bench = Bench(device)
    for name, scenario in wanted.items():
        target = folder / f"{name}.json"
        if not target.exists():
            profile = profile_of(scenario.profile, profiles)
            yield target, validation_json(*validate(scenario, profile, device, repeats=repeats, bench=bench))


@app.command()
def predict(folder: Folder, profiles: Profiles = None) -> None:
    """Predict every point in `folder` again, at the host's speed beside its execution; keep what was measured."""
    for path, point in read_points(folder).items():
        _keep(path, predict_again(point, profile_of(point["profile"], profiles)))


@app.command()
def table(folder: Folder, profiles: Profiles = None) -> None:
    """Print the table of all points in `folder`, and the summary above it, as Markdown."""
    points = list(read_points(folder).values())
    typer.echo(summary(points))
    unscaled = [predict_again(point, profile_of(point["profile"], profiles), host_speed=1.0) for point in points]
    typer.echo("Without the host's speed beside each point, at the speed that the profile was measured at:")
    typer.echo("\n".join(accuracy(unscaled)))
    typer.echo("")
    typer.echo(HEADER)
    for point in sorted(points, key=_order):
        typer.echo(_row(point))


def summary(points: Sequence[dict[str, Any]]) -> str:
    """How far the predictions are from the executions, over all points and schedules, a line a figure."""
    gains = [_gain(point, "measured") for point in points]
    told = (
        f"{stage} {np.median(values):+.2f}, {max(values, key=abs):+.2f}"
        for stage, values in sorted(stage_errors(points).items())
    )
    lines = [
        (
            f"{len(points)} points, {sum(len(point['error']) for point in points)} runs; "
            f"async gains {min(gains):+.1%} to {max(gains):+.1%}."
        ),
        *accuracy(points),
        f"Stages, median and worst signed error in % of a step: {'; '.join(told)}",
    ]
    return "\n".join(lines)


def accuracy(points: Sequence[dict[str, Any]]) -> list[str]:
    """A line each for throughput, the device's busy share, and the gain of async."""
    errors = [error for point in points for error in point["error"].values()]
    speed = np.abs([error["throughput_tokens_per_s"] for error in errors]) * 100
    busy = np.abs([error["device_busy_fraction"] for error in errors])
    gains = [(_gain(point, "predicted"), _gain(point, "measured")) for point in points]
    signs = sum(predicted * measured > 0 for predicted, measured in gains)
    gain = np.abs([predicted - measured for predicted, measured in gains]) * 100
    return [
        f"Tokens/s: median error {np.median(speed):.2f}%, worst {speed.max():.2f}%.",
        f"Device busy: median error {np.median(busy):.2f} points, worst {busy.max():.2f}.",
        (
            f"Gain of async: sign right on {signs} of {len(gains)}, median error {np.median(gain):.2f} points, "
            f"worst {gain.max():.2f}."
        ),
    ]


def stage_errors(points: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """For each stage its signed error in every run: what it adds to the mean step, in percent of that."""
    stages: dict[str, list[float]] = {}
    for point in points:
        for schedule in point["error"]:
            predicted, measured = (ScheduleResult(**point[side][schedule]) for side in ("predicted", "measured"))
            for stage, value in measured.stage_ms.items():
                told = predicted.stage_ms.get(stage, 0.0) * occurrence(predicted, stage)
                error = told - value * occurrence(measured, stage)
                stages.setdefault(stage, []).append(error / measured.step_ms["mean"] * 100)
    return stages


def read_points(folder: Path) -> dict[Path, dict[str, Any]]:
    """The points in `folder` by their paths."""
    points = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    if not points:
        raise typer.BadParameter(f"{folder} holds no points")
    return points


def profile_of(name: str, folder: Path | None) -> Profile:
    return load_profile(name if folder is None else f"{folder / name}.json")


def _keep(path: Path, point: dict[str, Any]) -> None:
    """Write a point, and say how far off its prediction is."""
    write_json(path, point)
    for schedule, error in point["error"].items():
        typer.echo(
            f"{path.stem} {schedule}: {point['measured'][schedule]['throughput_tokens_per_s']:,.0f} tokens/s measured, "
            f"error {error['throughput_tokens_per_s']:+.1%}, busy {error['device_busy_fraction']:+.1f} points"
        )


def _gain(point: dict[str, Any], side: str) -> float:
    return float(point[side]["async"]["gain_over_sync"])


def _order(point: dict[str, Any]) -> tuple[bool, int, int, int]:
    """With graphs first; then by model, batch and prompt."""
    scenario = point["scenario"]
    model = list(PROFILES).index(scenario["model"])
    return not scenario["cuda_graphs"], model, scenario["max_num_seqs"], scenario["workload"]["input_len"]


def _row(point: dict[str, Any]) -> str:
    measured, error = point["measured"], point["error"]
    cells = [point["scenario"]["name"]]
    for schedule in ("sync", "async"):
        cells += [
            f"{measured[schedule]['throughput_tokens_per_s']:,.0f}",
            f"{error[schedule]['throughput_tokens_per_s']:+.1%}",
        ]
    for schedule in ("sync", "async"):
        cells += [
            f"{measured[schedule]['device_busy_fraction']:.1%}",
            f"{error[schedule]['device_busy_fraction']:+.1f}",
        ]
    cells += [f"{_gain(point, 'measured'):+.1%}", f"{_gain(point, 'predicted'):+.1%}"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(app())
