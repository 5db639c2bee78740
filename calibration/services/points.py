"""Points of dynamic batching: execute a list of them, predict them, and tell how far off the predictions are.

python -m calibration.services.points run calibration/validation/dynamic/points.yaml --device cuda
python -m calibration.services.points predict calibration/validation/dynamic
python -m calibration.services.points table calibration/validation/dynamic
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from batchsim.dynamic import breaking_per_s
from batchsim.dynamic_scenario import DynamicScenario
from batchsim.engine import requests_of
from batchsim.files import write_json
from batchsim.profile import Profile
from batchsim.yaml_loader import load as load_yaml
from calibration.points import Folder, Profiles, profile_of, read_points, stage_errors
from calibration.services.predict import measured_json, predict_again

PROFILES = {
    "bert-base": "h200-bert-base",
    "resnet-50": "h200-resnet-50",
    "tiny-encoder": "cpu-tiny-encoder",
    "tiny-convnet": "cpu-tiny-convnet",
}
# The figures that are judged, and what the table calls them.
FIGURES = {
    "latency_ms.e2e.p50": "p50",
    "latency_ms.e2e.p99": "p99",
    "throughput_requests_per_s": "requests/s",
    "batch_size.mean": "batch",
}
LOST = ("refused", "dropped", "served_late")
HEADER = """\
| point | schedule | busy | p50, ms | p99, ms | requests/s | batch | queue | refused or late |
|---|---|--:|--:|--:|--:|--:|--:|--:|"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def scenarios(path: Path, profiles: Path | None = None, only: str = "") -> dict[str, DynamicScenario]:
    """The scenarios of a points file by name, in the file's order, those whose name starts with `only`.

    The rate of arrival is the point's `load` times what its first schedule serves by its profile, to three digits.
    """
    document = load_yaml(path).data
    found: dict[str, DynamicScenario] = {}
    loaded: dict[str, Profile] = {}
    for entry in document["points"]:
        point = {**document["defaults"], **entry}
        if not point["name"].startswith(only):
            continue
        load, seconds, least = (point.pop(key) for key in ("load", "seconds", "least"))
        name = PROFILES[point["model"]]
        if name not in loaded:
            loaded[name] = profile_of(name, profiles)
        workload = {**point.pop("workload"), "num_prompts": least, "request_rate": 1.0}
        whole = {"kind": "dynamic", "profile": name, **point}
        some = _scenario(whole, workload)
        capacity = breaking_per_s(some, loaded[name], some.schedules[0], requests_of(some))
        rate = float(f"{load * capacity:.3g}")
        arrivals = {"num_prompts": max(least, round(rate * seconds)), "request_rate": rate}
        found[point["name"]] = _scenario(whole, workload | arrivals)
    return found


def _scenario(whole: dict[str, Any], workload: dict[str, Any]) -> DynamicScenario:
    return DynamicScenario.model_validate({**whole, "workload": workload})


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="A list of points, YAML.")],
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    out: Annotated[Path | None, typer.Option(help="Folder for one JSON a point; default: the list's own.")] = None,
    repeats: Annotated[int, typer.Option(help="Executions of each schedule.")] = 3,
    profiles: Profiles = None,
    only: Annotated[str, typer.Option(help="Only points whose name starts so.")] = "",
    predicted: Annotated[bool, typer.Option(help="Predict each point, too; it can be done later.")] = True,
) -> None:
    """Execute every point, and write one JSON object a point; points already there are kept."""
    from calibration.services.bench import Bench
    from calibration.services.validate import execute

    bench = Bench(device)
    for name, scenario in scenarios(file, profiles, only).items():
        target = (out or file.parent) / f"{name}.json"
        if target.exists():
            continue
        profile = profile_of(scenario.profile or "", profiles)
        point = measured_json(execute(scenario, profile, device, repeats=repeats, bench=bench), profile)
        _keep(target, predict_again(point, profile) if predicted else point)


@app.command()
def predict(folder: Folder, profiles: Profiles = None) -> None:
    """Predict every point in `folder` again, at the host's speed beside its execution; keep what was measured."""
    for path, point in read_points(folder).items():
        _keep(path, predict_again(point, profile_of(point["profile"], profiles)))


@app.command()
def table(folder: Folder) -> None:
    """Print the errors of all points in `folder` as Markdown, and above them a summary of each list and of all."""
    points = list(read_points(folder).values())
    for path in sorted(folder.glob("*.yaml")):
        names = {entry["name"] for entry in load_yaml(path).data["points"]}
        if listed := [point for point in points if point["scenario"]["name"] in names]:
            typer.echo(f"{path.name}: {'; '.join(accuracy(listed))}")
    for line in summary(points):
        typer.echo(line)
    typer.echo("")
    typer.echo(HEADER)
    for point in points:
        for schedule in point["error"]:
            typer.echo(_row(point, schedule))


def accuracy(points: Sequence[dict[str, Any]]) -> list[str]:
    """How far the predictions are from the executions, over all points and schedules, a line a figure."""
    errors = [error for point in points for error in point["error"].values()]
    lines = [f"{len(errors)} runs of {len(points)} points, none of them fitted to"]
    for key, name in FIGURES.items():
        found = np.array([error[key] for error in errors]) * 100
        lines.append(
            f"{name}: median error {np.median(np.abs(found)):.2f}% (signed {np.median(found):+.2f}%), "
            f"worst {found[np.argmax(np.abs(found))]:+.1f}%"
        )
    return lines


def summary(points: Sequence[dict[str, Any]]) -> list[str]:
    """As `accuracy`, and how far off the stages and the parts of the latency are."""
    lines = accuracy(points)
    stages = ", ".join(
        f"{stage} {np.median(found):+.1f} ({found[np.argmax(np.abs(found))]:+.1f})"
        for stage, found in sorted(stage_errors(points).items())
    )
    lines.append(f"Stages, median (and largest) signed error in % of a mean step: {stages}")
    parts: dict[str, list[float]] = {}
    for point in points:
        for schedule in point["error"]:
            predicted, measured = (point[side][schedule]["latency_ms"] for side in ("predicted", "measured"))
            for part in measured:
                error = predicted[part]["mean"] - measured[part]["mean"]
                parts.setdefault(part, []).append(error / measured["e2e"]["mean"] * 100)
    told = ", ".join(f"{part} {np.median(found):+.1f} ({max(found, key=abs):+.1f})" for part, found in parts.items())
    lines.append(f"Latency, median (and largest) signed error of each part in % of the mean latency: {told}")
    return lines


def _keep(path: Path, point: dict[str, Any]) -> None:
    """Write a point, and say what was measured and how far off its prediction is."""
    write_json(path, point)
    for schedule, measured in point["measured"].items():
        told = (
            f"e2e p50 {measured['latency_ms']['e2e']['p50']:.2f} ms, p99 {measured['latency_ms']['e2e']['p99']:.2f} ms"
        )
        if "error" in point:
            error = point["error"][schedule]
            told += "; errors " + ", ".join(f"{name} {error[key]:+.1%}" for key, name in FIGURES.items())
        typer.echo(f"{path.stem} {schedule}: {told}")


def _row(point: dict[str, Any], schedule: str) -> str:
    measured, error = point["measured"][schedule], point["error"][schedule]
    predicted = point["predicted"][schedule]
    latency = measured["latency_ms"]
    queue = (predicted["latency_ms"]["queue"]["mean"] - latency["queue"]["mean"]) / latency["e2e"]["mean"]

    lost, told = (sum(side["outcomes"][name] for name in LOST) for side in (measured, predicted))
    cells = [
        point["scenario"]["name"],
        schedule,
        f"{measured['device_busy_fraction']:.0%}",
        f"{latency['e2e']['p50']:.2f} {error['latency_ms.e2e.p50']:+.1%}",
        f"{latency['e2e']['p99']:.2f} {error['latency_ms.e2e.p99']:+.1%}",
        f"{measured['throughput_requests_per_s']:,.0f} {error['throughput_requests_per_s']:+.1%}",
        f"{measured['batch_size']['mean']:.1f} {error['batch_size.mean']:+.1%}",
        f"{queue * 100:+.1f} pt",
        f"{lost:,} (predicted {told:,})" if lost or told else "",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(app())
