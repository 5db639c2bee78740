"""`batchsim sweep`: many variants of one scenario, on the cores of this machine or on a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from batchsim.command import Json, check_folder, outcome, print_json, progress_bar
from batchsim.errors import InputError, shown

SweepFile = Annotated[Path, typer.Argument(metavar="FILE", help="A sweep in YAML.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Give `app` the command."""
    app.command()(sweep)


def sweep(
    file: SweepFile,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the points, results.parquet and report.html there.")
    ] = None,
    engine: Annotated[str, typer.Option(metavar="NAME", help="processes (of this machine) or ray.")] = "processes",
    address: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Of --engine ray, the cluster; auto: this machine's.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=0, max=4096, help="Processes; by default as many as cores. 0: none.")
    ] = None,
    draws: Annotated[
        int | None, typer.Option(metavar="N", min=0, max=10_000, help="Draws for the intervals; 0: no intervals.")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Replace a value of the file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Simulate a grid, a list or a Latin hypercube of variants of a scenario; goes on where it was interrupted."""
    with outcome():
        from batchsim.sweep.run import ENGINES, read, run

        if engine not in ENGINES:
            raise InputError("--engine", "", shown(engine), " or ".join(ENGINES))
        if address is not None and engine != "ray":
            raise InputError("--address", "", shown(address), "--engine ray as well")
        if workers is not None and engine == "ray":
            raise InputError("--workers", "", str(workers), "--engine processes: the cluster has as many as cores")
        check_folder(out)
        asked = read(file, sets or (), draws=draws)
        told = ""

        def tell(done: int, total: int, failed: int, before: int) -> None:
            nonlocal told
            told = f"{done:,} of {total:,} points" + (f", {failed:,} failed" if failed else "")
            if progress is not None and total > before:
                progress((done - before) / (total - before), f"{file.name}: {told}")

        try:
            with progress_bar(file.name) as progress:
                result = run(asked, out, engine=engine, workers=workers, address=address, progress=tell)
        except KeyboardInterrupt:
            if out is not None and told:
                typer.echo(f"{told} are done; the same command goes on from there", err=True)
            raise
        if as_json:
            print_json(result.to_json())
        else:
            from rich.console import Console

            from batchsim.report.sweep_terminal import print_sweep

            print_sweep(Console(), result)
        if out is not None:
            typer.echo(f"wrote {out}: sweep.json, results.parquet, report.html, points/", err=True)
