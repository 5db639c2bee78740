"""Validation points of training: execute a list of them, predict them again, and tell how far off that is.

python -m calibration.training.points run calibration/validation/training/points.yaml --device cuda
python -m calibration.training.points predict calibration/validation/training
python -m calibration.training.points table calibration/validation/training
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from batchsim.batching.accumulation import divisors
from batchsim.files import write_json
from batchsim.result import ScheduleResult, validation_json
from batchsim.training import simulate
from batchsim.training_profile import TrainingProfile, load_training_profile
from batchsim.training_scenario import TrainingScenario
from batchsim.yaml_loader import load as load_yaml
from calibration.points import read_points
from calibration.training.validate import Bench, predict_again, validate

HEADER = """\
| point | host/device | sync ms | error | async ms | error | gain | predicted |
|---|--:|--:|--:|--:|--:|--:|--:|"""

STAGES_HEADER = """\
| stage | runs | median error, signed | unsigned | worst |
|---|--:|--:|--:|--:|"""
HOST_STAGES, DEVICE_STAGES = ("launch_forward", "launch_backward"), ("forward", "backward", "optimizer")
LEAST_SHARE = 0.05  # of a step's time, for a stage to be told of
HOST_BOUND = 0.9  # share of the device's time that the host takes, from which on its own stages are told of

Folder = Annotated[Path, typer.Argument(help="Folder of points.")]
Profiles = Annotated[Path | None, typer.Option(help="Folder of profiles in place of the shipped ones.")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def scenarios(path: Path) -> dict[str, TrainingScenario]:
    """The scenarios of a points file by name: its points, and of each of its choices all micro-batches and
    checkpointings."""
    document = load_yaml(path).data
    entries = [dict(entry) for entry in document.get("points", ())]
    for choice in document.get("choices", ()):
        entries += [
            {**choice, "micro_batch": size, "checkpointing": kind, "schedules": ["async"]}
            for kind in ("none", "full")
            for size in divisors(choice["global_batch"])
        ]
    found = {}
    for entry in entries:
        point = {**document["defaults"], **entry}
        name = name_of(point)
        profile = f"{document['profiles']}-{point['model']}"
        found[name] = TrainingScenario(kind="training", name=name, **{"profile": profile, **point})
    return found


def name_of(point: dict[str, Any]) -> str:
    """`160m-s512-g64-m4-full-bf16`: the model, sequence length, global and micro-batch, and what is not the default."""
    name = (
        f"{point['model'].split('-')[-1]}-s{point['sequence_length']}-g{point['global_batch']}-m{point['micro_batch']}"
    )
    others = (("checkpointing", "none"), ("precision", "mixed"), ("optimizer", "adamw"))
    name += "".join(f"-{point[key]}" for key, usual in others if point.get(key, usual) != usual)
    ms = point.get("data", {}).get("prepare_ms_per_sequence")
    return name if ms is None else f"{name}-prepare{ms:g}"


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="A list of points, YAML.")],
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    out: Annotated[Path | None, typer.Option(help="Folder for one JSON a point; default: the list's own.")] = None,
    repeats: Annotated[int, typer.Option(help="Executions of each schedule.")] = 3,
    profiles: Profiles = None,
    only: Annotated[str, typer.Option(help="Only points whose name starts so.")] = "",
    bound: Annotated[float, typer.Option(help="Only where the host takes this share of the device's time.")] = 0.0,
    seconds: Annotated[float, typer.Option(help="Begin no further point after so long.")] = 1e9,
) -> None:
    """Execute and predict every point, and write one JSON object a point; points already there are kept."""
    import torch

    folder, until = out or file.parent, time.monotonic() + seconds
    bench = Bench(device)
    wanted = scenarios(file)
    for name in sorted(wanted, key=lambda each: (wanted[each].model, wanted[each].precision)):  # a model at a time
        scenario = wanted[name]
        target = folder / f"{name}.json"
        if target.exists() or not name.startswith(only):
            continue
        profile = _profile(scenario.profile, profiles)
        if bound and _host_share(next(iter(simulate(scenario, profile).results.values()))) < bound:
            continue
        if time.monotonic() > until:
            typer.echo(f"{name}: no time left")
            continue
        began = time.monotonic()
        try:
            found = validate(scenario, profile, device, repeats=repeats, bench=bench)
        except torch.OutOfMemoryError:
            bench = Bench(device)
            bench.free()
            typer.echo(f"{name}: does not fit")
            write_json(target, {"scenario": scenario.model_dump(mode="json"), "fits": False})
            continue
        point = validation_json(*found)
        _keep(target, point)
        typer.echo(f"  in {time.monotonic() - began:.1f} s")


@app.command()
def predict(folder: Folder, profiles: Profiles = None) -> None:
    """Predict every point in `folder` again, at the host's speed beside its execution; keep what was measured."""
    for path, point in fitting(folder).items():
        _keep(path, predict_again(point, _profile(point["scenario"]["profile"], profiles)))


@app.command()
def table(folder: Folder, profiles: Profiles = None) -> None:
    """Print the table of all points in `folder`, and the summary above it, as Markdown."""
    points = list(fitting(folder).values())
    typer.echo("\n".join(summary(points)))
    as_calibrated = [
        predict_again(point, _profile(point["scenario"]["profile"], profiles), as_calibrated=True) for point in points
    ]
    typer.echo("Without the host's speed beside each point, at the speed that the profile was measured at:")
    typer.echo(accuracy(as_calibrated))
    typer.echo("")
    typer.echo(STAGES_HEADER)
    for stage, errors in stage_errors(points).items():
        worst = max(errors, key=abs)
        typer.echo(
            f"| {stage} | {len(errors)} | {np.median(errors):+.1%} | {np.median(np.abs(errors)):.1%} | {worst:+.1%} |"
        )
    typer.echo("")
    typer.echo(HEADER)
    for point in points:
        typer.echo(_row(point))


@dataclass(frozen=True, slots=True)
class Choice:
    """The same optimiser step cut into micro-batches in every way that fits: names of points, milliseconds."""

    chosen: str
    best: str
    chosen_ms: float
    best_ms: float
    of: int

    @property
    def regret(self) -> float:
        """By how much the one that is predicted to be fastest is slower than the fastest, as measured."""
        return self.chosen_ms / self.best_ms - 1


def choices(points: Iterable[dict[str, Any]], least: int = 4) -> list[Choice]:
    """One for each model, sequence length, global batch, precision and optimiser with at least so many points."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    keys = ("model", "sequence_length", "global_batch", "precision", "optimizer")
    for point in points:
        if "async" in point["measured"]:
            groups[tuple(point["scenario"][key] for key in keys)].append(point)
    found = []
    for group in groups.values():
        if len(group) >= least:
            chosen, best = (min(group, key=partial(_step_ms, side=side)) for side in ("predicted", "measured"))
            names = chosen["scenario"]["name"], best["scenario"]["name"]
            found.append(Choice(*names, _step_ms(chosen, "measured"), _step_ms(best, "measured"), len(group)))
    return found


def fitting(folder: Path) -> dict[Path, dict[str, Any]]:
    """The points in `folder` that fit the device that they were measured on."""
    return {path: point for path, point in read_points(folder).items() if point.get("fits", True)}


def summary(points: Sequence[dict[str, Any]]) -> list[str]:
    """How far the predictions are from the executions, a line a figure."""
    lines = [f"{len(points)} points, {len(_errors(points))} runs.", accuracy(points)]
    lines += [
        f"Of {choice.of} ways, {choice.chosen} is predicted to be the fastest: {choice.chosen_ms:,.1f} ms; "
        f"{choice.best} is: {choice.best_ms:,.1f} ms; {choice.regret:+.1%}."
        for choice in choices(points)
    ]
    return lines


def accuracy(points: Sequence[dict[str, Any]]) -> str:
    errors = np.abs(_errors(points)) * 100
    return f"Time of an optimiser step: median error {np.median(errors):.2f}%, worst {errors.max():.2f}%."


def stage_errors(points: Iterable[dict[str, Any]]) -> dict[str, list[float]]:
    """Relative errors of the stages that take at least `LEAST_SHARE` of a step, by stage and over all runs.

    On the host those of runs that it nearly or wholly bounds: elsewhere it blocks in whatever call finds the launch
    queue full, which the model counts as waiting.
    """
    found: dict[str, list[float]] = {stage: [] for stage in ("step", *HOST_STAGES, *DEVICE_STAGES)}
    for point in points:
        accumulated = point["scenario"]["global_batch"] // point["scenario"]["micro_batch"]
        for schedule, error in point["error"].items():
            measured = point["measured"][schedule]
            bound = _host_share(ScheduleResult(**point["predicted"][schedule])) >= HOST_BOUND
            found["step"].append(error["step_ms.mean"])
            for stage in (*(HOST_STAGES if bound else ()), *DEVICE_STAGES):
                times = accumulated if stage in ("forward", "backward") else 1
                if measured["stage_ms"].get(stage, 0.0) * times >= LEAST_SHARE * measured["step_ms"]["mean"]:
                    found[stage].append(error[f"stage_ms.{stage}"])
    return {stage: errors for stage, errors in found.items() if errors}


def _errors(points: Sequence[dict[str, Any]]) -> list[float]:
    return [error["step_ms.mean"] for point in points for error in point["error"].values()]


def _step_ms(point: dict[str, Any], side: str, schedule: str = "async") -> float:
    return float(point[side][schedule]["step_ms"]["mean"])


def _profile(name: str, folder: Path | None) -> TrainingProfile:
    return load_training_profile(name if folder is None else f"{folder / name}.json")


def _keep(path: Path, point: dict[str, Any]) -> None:
    """Write a point, and say how far off its prediction is."""
    write_json(path, point)
    for schedule, error in point["error"].items():
        ms = _step_ms(point, "measured", schedule)
        speed = "/".join(f"{each:.2f}" for each in point["provenance"]["measured"]["host_speed"][schedule])
        stages = " ".join(
            f"{stage} {error[f'stage_ms.{stage}']:+.1%}" for stage in ("forward", "backward", "optimizer")
        )  # fmt: skip
        typer.echo(
            f"{path.stem} {schedule}: {ms:,.2f} ms a step, error {error['step_ms.mean']:+.1%} ({stages}), host {speed}"
        )


def _host_share(result: ScheduleResult) -> float:
    """The host's time of launching micro-batches, over the device's of computing them."""
    accumulated = result.counts["micro_batches"] / result.counts["steps"]
    host = sum(ms for stage, ms in result.stage_ms.items() if stage.startswith("launch_"))
    return host / sum(result.stage_ms[stage] * accumulated for stage in ("forward", "backward"))


def _row(point: dict[str, Any]) -> str:
    measured = point["measured"]
    first = point["predicted"][next(iter(measured))]
    cells = [point["scenario"]["name"], f"{_host_share(ScheduleResult(**first)):.0%}"]
    for schedule in ("sync", "async"):
        told = schedule in measured
        cells += [
            f"{_step_ms(point, 'measured', schedule):,.1f}" if told else "",
            f"{point['error'][schedule]['step_ms.mean']:+.1%}" if told else "",
        ]
    gains = [point[side].get("async", {}).get("gain_over_sync") for side in ("measured", "predicted")]
    cells += ["" if gain is None else f"{gain:+.1%}" for gain in gains]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(app())
