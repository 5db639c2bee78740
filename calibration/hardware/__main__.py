"""Executions on parts of a device, on slowed hosts and on replicas that share one, and how far off predictions are.

python -m calibration.hardware run calibration/validation/hardware/points.yaml --device cuda --out DIR
python -m calibration.hardware predict calibration/validation/hardware
python -m calibration.hardware table calibration/validation/hardware
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from batchsim.command import outcome
from batchsim.files import write_json
from batchsim.kinds import on_hardware
from batchsim.profile import Profile
from batchsim.scenario import Scenario
from calibration.hardware.points import read
from calibration.hardware.table import rows, summary
from calibration.hardware.worker import missing
from calibration.points import Folder, Profiles, profile_of, read_points
from calibration.predict import predict_again

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="A list of configurations, YAML.")],
    out: Annotated[Path, typer.Option(help="Folder for one JSON a point.")],
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    repeats: Annotated[int, typer.Option(help="Executions of each schedule.")] = 2,
    profiles: Profiles = None,
    only: Annotated[str, typer.Option(help="Only points whose name starts so.")] = "",
    seconds: Annotated[int, typer.Option(help="Time for all.")] = 3600,
    each: Annotated[int, typer.Option(help="Time for one configuration; then it is ended.")] = 300,
) -> None:
    """Execute every point, a process for each configuration; points already there are kept, and a failed one is not."""
    with outcome():
        signal.signal(signal.SIGTERM, _leave)  # so that what was started is ended
        end, failed = time.monotonic() + seconds, []
        out.mkdir(parents=True, exist_ok=True)
        for name, configuration in read(file).items():
            if not missing(configuration, out, only):
                continue
            left = min(each, int(end - time.monotonic()))
            options = {"--device": device, "--out": out, "--repeats": repeats, "--only": only, "--seconds": left}
            command = [
                "-m",
                "calibration.hardware.worker",
                file,
                name,
                *(part for pair in options.items() for part in pair),
            ]
            command += [] if profiles is None else ["--profiles", profiles]
            typer.echo(f"{name}:")
            if left < 1 or not _ended_well([sys.executable, *map(str, command)], left):
                failed.append(name)
        if failed:
            typer.echo(f"not done: {', '.join(failed)}", err=True)
            raise typer.Exit(1)


def _ended_well(command: Sequence[str], seconds: int) -> bool:
    """Whether a command ended well within its time; nothing that it started is left in any case."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(seconds + 5) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _leave(*_: object) -> NoReturn:
    sys.exit(143)


@app.command()
def predict(folder: Folder, profiles: Profiles = None) -> None:
    """Predict every point in `folder` on its hardware, at the host's speed beside its execution."""
    with outcome():
        for path, point in read_points(folder).items():
            predicted = transferred_again(point, profile_of(point["profile"], profiles))
            write_json(path, predicted)
            for schedule, error in predicted["error"].items():
                measured = predicted["measured"][schedule]["throughput_tokens_per_s"]
                typer.echo(f"{path.stem} {schedule}: {measured:,.0f} tokens/s, {error['throughput_tokens_per_s']:+.1%}")


def transferred_again(point: dict[str, Any], profile: Profile) -> dict[str, Any]:
    """An executed point with its prediction made anew: by `profile`, transferred to the point's hardware."""
    target = on_hardware(profile, Scenario.model_validate(point["scenario"]))
    assert isinstance(target, Profile)
    return predict_again(point, target)


@app.command()
def table(folder: Folder) -> None:
    """Print the errors of all points in `folder` as Markdown, and above them a summary of each kind."""
    points = list(read_points(folder).values())
    for line in (*summary(points), "", *rows(points)):
        typer.echo(line)


if __name__ == "__main__":
    sys.exit(app())
