"""Fit a service's profile anew to the samples that its calibration kept; nothing is measured.

python -m calibration.services.refit profiles/h200-bert-base.json           # from profiles/h200-bert-base.json.partial
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from batchsim.files import write_text
from batchsim.profile import Profile, load_profile
from calibration.calibrate import profile_text
from calibration.services.cells import Cell, of_any_length
from calibration.services.fit import Measured, fit_profile, regimes
from calibration.store import Store

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def refit(
    profile: Annotated[Path, typer.Argument(help="A profile whose samples are kept beside it.")],
    out: Annotated[Path | None, typer.Option(help="The new profile; default: in place of the old one.")] = None,
    cells: Annotated[str, typer.Option(help="Which cells count: busy, paced, or both.")] = "both",
) -> None:
    """Fit `profile` anew to its samples."""
    old = load_profile(str(profile.resolve()))
    measured = samples_of(profile.with_name(profile.name + ".partial"))
    kept = {c: s for c, s in measured.items() if cells == "both" or c.paced == (cells == "paced") or not c.graphs}
    new = refitted(old, kept)
    write_text(out or profile, profile_text(new))
    for name, share in regimes(measured).items():
        typer.echo(f"{name}: paced cells take {share:+.1%} against busy ones")


def samples_of(partial: Path) -> Measured:
    """The samples of each cell that a calibration has kept."""
    identity = json.loads(partial.read_text(encoding="utf-8"))["identity"]
    store = Store(partial, identity, resume=True, kind=of_any_length)
    return store.measured({cell_of(key) for key, _ in store.runs})


def cell_of(key: str) -> Cell:
    """The cell of such a key."""
    schedule, launches, rests, num_seqs, length = key.split("/")
    return Cell(schedule, launches == "graph", rests == "paced", int(num_seqs), int(length))


def refitted(old: Profile, measured: Measured) -> Profile:
    """`old`, all that is fitted of it fitted to `measured`."""
    ordered = {cell: measured[cell] for cell in sorted(measured, key=lambda c: (c.loop, c.paced, *c.kind))}
    return fit_profile(
        ordered, name=old.name, model=old.model, facts=old.provenance | {"paced_over_busy": regimes(ordered)},
        device_memory_bytes=old.device_memory_bytes, overlaps=old.overlaps, kernels=old.kernels, copies=old.copies,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(app())
