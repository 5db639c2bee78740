"""Serving scenarios executed on a tensor-parallel group of devices, and the collectives of their link measured.

python -m calibration.hardware.tensor_parallel check --device cuda
python -m calibration.hardware.tensor_parallel link --device cuda \
    --out calibration/validation/hardware/link/h200-pair.json
python -m calibration.hardware.tensor_parallel run calibration/validation/hardware/tensor_parallel.yaml --device cuda \
    --out calibration/validation/hardware/tensor_parallel
python -m calibration.hardware.tensor_parallel predict calibration/validation/hardware/tensor_parallel

One process a device runs the same schedule against a batcher of its own. The requests are all there at the start, so
no decision depends on a clock, and all ranks take the same ones; what is measured is rank 0.
"""

from __future__ import annotations

import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

from batchsim.command import outcome
from batchsim.errors import InputError, RunError
from batchsim.files import write_json
from batchsim.hardware.transfer import for_scenario
from batchsim.model import MODELS
from batchsim.scenario import Scenario
from batchsim.yaml_loader import load as load_yaml
from calibration.device import prepare
from calibration.hardware.link import LARGEST_BYTES, measure
from calibration.hardware.ranks import joined, launch
from calibration.hardware.sharded import Rank, compare, decoder_for, execute
from calibration.points import PROFILES, Folder, Profiles, profile_of, read_points
from calibration.predict import predict_again
from calibration.services.predict import measured_json

MODULE = "calibration.hardware.tensor_parallel"

DeviceName = Annotated[str, typer.Option("--device", help="cuda, or cpu for a trial through Gloo.")]
Devices = Annotated[int, typer.Option(help="Devices of the group.")]
Seconds = Annotated[float, typer.Option(help="After so long all ranks are ended.")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def scenarios(path: Path, only: str = "") -> dict[str, Scenario]:
    """The scenarios of a points file by name, in the file's order, those whose name starts with `only`.

    Raises:
        InputError: a scenario whose ranks could take different decisions, or groups of several sizes.
    """
    document = load_yaml(path).data
    found: dict[str, Scenario] = {}
    for number, entry in enumerate(document["points"]):
        point = {**document["defaults"], **entry}
        if not point["name"].startswith(only):
            continue
        point.setdefault("profile", PROFILES.get(point["model"]))
        scenario = found[point["name"]] = Scenario(kind="serving", **point)
        key = f"points[{number}]"
        if not scenario.all_at_once:
            wanted = "requests that are all there at the start: else each device's host would form other batches"
            raise InputError(str(path), f"{key}.workload", "requests that arrive over time", wanted)
        if scenario.replicas > 1:
            raise InputError(str(path), f"{key}.replicas", f"{scenario.replicas}", "1: the devices are one replica")
        if scenario.tensor_parallel != next(iter(found.values())).tensor_parallel:
            wanted = "the same in all points of a file"
            raise InputError(str(path), f"{key}.tensor_parallel", f"{scenario.tensor_parallel}", wanted)
    return found


@app.command()
def check(
    device: DeviceName = "cuda",
    devices: Devices = 2,
    model: Annotated[str, typer.Option(help="The model whose tokens are compared.")] = "tiny",
    seconds: Seconds = 60,
) -> None:
    """Check that the shards of a model generate the tokens that the whole of it generates."""
    with outcome():
        _launch("check", devices, seconds, device=device, model=model)
    typer.echo(f"{model} on {devices} devices: the tokens of the whole model, in both schedules")


@app.command()
def link(
    out: Annotated[Path, typer.Option(help="The JSON file to write.")],
    device: DeviceName = "cuda",
    devices: Devices = 2,
    largest: Annotated[int, typer.Option(help="Bytes of the largest all-reduce.")] = LARGEST_BYTES,
    seconds: Seconds = 60,
) -> None:
    """Measure all-reduces by their size."""
    with outcome():
        _launch("link", devices, seconds, device=device, out=str(out), largest=largest)


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="A list of points, YAML.")],
    device: DeviceName = "cuda",
    out: Annotated[Path | None, typer.Option(help="Folder for one JSON a point; default: the list's own.")] = None,
    repeats: Annotated[int, typer.Option(help="Executions of each schedule.")] = 2,
    profiles: Profiles = None,
    only: Annotated[str, typer.Option(help="Only points whose name starts so.")] = "",
    seconds: Seconds = 600,
) -> None:
    """Execute every point, and write one JSON object a point, to be predicted later; points already there are kept."""
    folder = out or file.parent
    with outcome():
        wanted = {name: each for name, each in scenarios(file, only).items() if not (folder / f"{name}.json").exists()}
        if wanted:
            (size,) = {scenario.tensor_parallel for scenario in wanted.values()}
            told = {name: scenario.model_dump(mode="json") for name, scenario in wanted.items()}
            where = {"out": str(folder), "profiles": profiles and str(profiles)}
            _launch("run", size, seconds, device=device, repeats=repeats, scenarios=told, **where)


@app.command()
def predict(folder: Folder, profiles: Profiles = None) -> None:
    """Predict every point in `folder`, at the hosts' speed beside its execution; keep what was measured."""
    for path, point in read_points(folder).items():
        scenario = Scenario.model_validate(point["scenario"])
        again = predict_again(point, for_scenario(profile_of(point["profile"], profiles), scenario))
        write_json(path, again)
        for schedule, error in again["error"].items():
            _tell(path.stem, schedule, again, f", error {error['throughput_tokens_per_s']:+.1%}")


@app.command(hidden=True)
def rank(job: str, number: int, store: str) -> None:
    """One rank of a job that another command launched."""
    asked = json.loads(job)
    prepare(asked["device"], asked["job"])
    with outcome(), joined(number, asked["devices"], store, asked["device"]) as device:
        JOBS[asked["job"]](Rank(number, asked["devices"], device, dist.all_reduce), asked)


def _launch(job: str, devices: int, seconds: float, **asked: Any) -> None:
    prepare(asked["device"], job)
    if asked["device"] == "cuda" and (there := torch.cuda.device_count()) < devices:
        raise RunError(f"{devices} CUDA devices are needed, and {there} found; run it on a machine with them")
    text = json.dumps({"job": job, "devices": devices, **asked})
    launch([sys.executable, "-m", MODULE, "rank", text], devices, limit_s=seconds)


def _check(rank: Rank, asked: dict[str, Any]) -> None:
    compare(MODELS[asked["model"]], rank)


def _link(rank: Rank, asked: dict[str, Any]) -> None:
    found = measure(rank.all_reduce, rank.device, asked["largest"])
    found["provenance"] = rank.facts(f"python -m {MODULE} link")
    if rank.number == 0:
        write_json(Path(asked["out"]), found)


def _run(rank: Rank, asked: dict[str, Any]) -> None:
    scenarios = {name: Scenario.model_validate(told) for name, told in asked["scenarios"].items()}
    folder = Path(asked["profiles"]) if asked["profiles"] else None
    for _, group in groupby(scenarios.items(), key=lambda item: item[1].model):
        points = dict(group)
        profile = profile_of(next(iter(points.values())).profile, folder)
        decoder = decoder_for(list(points.values()), profile, rank)
        for name, scenario in points.items():
            command = f"python -m {MODULE} run --device {asked['device']}"
            measured = execute(scenario, profile, decoder, rank, repeats=asked["repeats"], command=command)
            if rank.number == 0:
                point = measured_json(measured, profile)
                write_json(Path(asked["out"]) / f"{name}.json", point)
                for schedule in measured.results:
                    _tell(name, schedule, point)
        del decoder


def _tell(name: str, schedule: str, point: dict[str, Any], more: str = "") -> None:
    result, speed = point["measured"][schedule], point["provenance"]["measured"]["host_speed"]
    told = f"{result['throughput_tokens_per_s']:,.0f} tokens/s, step {result['step_ms']['p50']:.2f} ms"
    typer.echo(f"{name} {schedule}: {told}, busy {result['device_busy_fraction']:.0%}, host speed {speed}{more}")


JOBS = {"check": _check, "link": _link, "run": _run}


if __name__ == "__main__":
    sys.exit(app())
