"""Device memory: measure what no formula knows, measure held-out points, and compare them with what is predicted.

python -m calibration.memory probe --out probes.json
python -m calibration.memory fit probes.json --out calibration/profiles/memory/h200.json
python -m calibration.memory run calibration/validation/memory/points.yaml --out calibration/validation/memory/h200.json
python -m calibration.memory table calibration/validation/memory/points.yaml calibration/validation/memory/h200.json
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from batchsim.files import write_bytes, write_json
from batchsim.memory.overheads import Library, library_for
from calibration.memory.points import Point, read, told, with_batch

Points = Annotated[Path, typer.Argument(help="A list of points, YAML.")]
Profile = Annotated[Path | None, typer.Option(help="Measured overheads in place of the shipped ones.")]

Only = Annotated[list[str] | None, typer.Option(help="Only points whose name starts so; may be repeated.")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def probe(out: Annotated[Path, typer.Option(help="The file to write, JSON.")]) -> None:
    """Measure what libraries and kernels take."""
    from calibration.memory.probe import probe
    from calibration.provenance import provenance

    write_json(out, {"provenance": provenance("cuda", "python -m calibration.memory probe"), **probe()})


@app.command()
def fit(
    probes: Annotated[Path, typer.Argument(help="What `probe` wrote.")],
    out: Annotated[Path, typer.Option(help="The profile to write, JSON.")],
) -> None:
    """Fit the overheads of a device to its probes, and tell how far off they are."""
    from calibration.memory.fit import fit_library

    library, lines = fit_library(json.loads(probes.read_text(encoding="utf-8")), out.stem)
    write_json(out, library.model_dump(mode="json"))
    for line in lines:
        typer.echo(line)


@app.command()
def run(
    points: Points,
    out: Annotated[Path, typer.Option(help="The file to write, JSON; points already in it are kept.")],
    only: Only = None,
    profile: Profile = None,
) -> None:
    """Measure every point, and look for every edge, starting from where it is predicted."""
    import torch

    from calibration.memory.measure import edge, measure
    from calibration.memory.predict import predicted_edge, predicted_peak
    from calibration.provenance import provenance

    library = _library(profile, torch.cuda.get_device_name())
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"points": {}}
    found["provenance"] = provenance("cuda", f"python -m calibration.memory run {points.name}")
    for point in read(points):
        if point.name in found["points"] or not _wanted(point, only):
            continue
        measured: dict[str, int]
        if point.capacity is None:
            try:
                taken = measure(point.program)
            except torch.OutOfMemoryError as error:
                typer.echo(f"{point.name}: {error}")
                continue
            measured = {"allocated": taken.allocated, "reserved": taken.reserved, "beside": taken.beside}
            off = predicted_peak(point.program, library).allocated / taken.allocated - 1
            typer.echo(f"{point.name}: {taken.allocated / 1e9:.3f} GB allocated, predicted {off:+.2%}")
        else:
            guess = predicted_edge(point, library)
            batch = edge(lambda batch, point=point: with_batch(point.program, batch), max(guess, 1), point.capacity)  # type: ignore[misc]
            measured = {"largest": batch}
            typer.echo(f"{point.name}: {batch} is the largest, predicted {guess}")
        found["points"][point.name] = {"program": told(point.program), "measured": measured}
        write_json(out, found)


@app.command()
def history(
    points: Points,
    out: Annotated[Path, typer.Option(help="The file to write, gzipped JSON.")],
    only: Only = None,
) -> None:
    """What the allocator does, call by call: for finding out why a prediction is off."""
    from calibration.memory.measure import history

    found = {
        point.name: history(point.program) for point in read(points) if point.capacity is None and _wanted(point, only)
    }
    write_bytes(out, gzip.compress(json.dumps(found, separators=(",", ":")).encode()))


@app.command()
def table(
    points: Points,
    measured: Annotated[Path, typer.Argument(help="What `run` wrote.")],
    only: Only = None,
    profile: Profile = None,
) -> None:
    """Print predictions beside measurements, and a summary above them, as Markdown."""
    from calibration.memory.predict import compare

    found = json.loads(measured.read_text(encoding="utf-8"))
    chosen = [point for point in read(points) if _wanted(point, only)]
    for line in compare(chosen, found["points"], _library(profile, found["provenance"]["device"])):
        typer.echo(line)


def _wanted(point: Point, only: list[str] | None) -> bool:
    return not only or point.name.startswith(tuple(only))


def _library(profile: Path | None, device: str) -> Library:
    if profile is None:
        return library_for(device)
    return Library.model_validate_json(profile.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(app())
