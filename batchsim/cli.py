"""The command line: reads options, calls the library, prints and writes what it returns.

Libraries are imported inside the commands, so that `batchsim --help` answers at once.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchsim import __version__
from batchsim.errors import InputError, RunError, shown

if TYPE_CHECKING:
    from typing import Protocol

    from batchsim.profile import Profile
    from batchsim.result import Run
    from batchsim.scenario import Scenario

    class Tell(Protocol):
        def __call__(self, fraction: float | None, what: str = ...) -> None: ...


FAILED, REFUSED, INTERRUPTED, PIPE_CLOSED = 1, 2, 130, 141

app = typer.Typer(
    name="batchsim",
    help="Predict what a CPU/GPU batching pipeline will do, and prove it on the GPU.",
    epilog="Exit codes: 0 done, 1 a failed run, 2 refused input.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ScenarioFile = Annotated[Path, typer.Argument(metavar="FILE", help="A scenario in YAML.", show_default=False)]
ScenarioFiles = Annotated[list[Path], typer.Argument(metavar="FILE...", help="Scenarios in YAML.", show_default=False)]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Replace a value of the file, as workload.num_prompts=64."),
]
Schedules = Annotated[
    str | None, typer.Option(metavar="NAMES", help="Schedules in place of the file's, as sync,async.")
]
ProfileName = Annotated[
    str | None, typer.Option("--profile", metavar="NAME|FILE", help="A profile in place of the file's.")
]
Out = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Write result.json, report.html and trace.json into this folder.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Device = Annotated[str, typer.Option(metavar="cuda|cpu", help="The device to measure.")]


def main() -> None:
    """The `batchsim` command."""
    app(prog_name="batchsim")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"batchsim {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    file: ScenarioFile,
    schedules: Schedules = None,
    sets: Sets = None,
    profile: ProfileName = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Simulate a scenario at the measured costs of a profile."""
    with _outcome():
        scenario, costs = _read(file, sets, schedules, profile)
        _check_folder(out)
        with _blame(file), _progress(f"simulating {file.name}") as progress:
            from batchsim.engine import simulate

            status = None if progress is None else partial(progress, None)
            predicted = simulate(scenario, costs, progress=progress, status=status, base=file.parent)
            interrupted = any(result.partial for result in predicted.results.values())
            if out is not None and not interrupted:
                from dataclasses import replace

                from batchsim.load import load_curve

                if status is not None:
                    status("at other loads")
                try:
                    curve = load_curve(scenario, costs, base=file.parent, progress=progress)
                except KeyboardInterrupt:
                    interrupted = True
                else:
                    predicted = replace(predicted, load_curve=curve)

        from batchsim.result import run_json

        value = run_json(predicted)
        _tell(value, predicted, None, out, as_json=False, quiet=as_json)
        if as_json:
            for name, result in predicted.results.items():
                value["schedules"][name]["engine_s"] = result.engine_s
            _print_json(value)
        if interrupted:
            raise KeyboardInterrupt


@app.command()
def validate(
    files: ScenarioFiles,
    device: Device = "cuda",
    schedules: Schedules = None,
    sets: Sets = None,
    profile: ProfileName = None,
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Executions of each schedule.")] = 3,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Simulate scenarios, execute them on a device, and compare the two.

    Several files print a list of JSON objects and write into a folder each, named after the file.
    """
    with _outcome():
        _check_device(device)
        _check_folder(out)
        # All input is checked before any time is spent on a device.
        inputs = [(file, *_read(file, sets, schedules, profile)) for file in files]
        _need_torch()
        from batchsim.result import validation_json
        from calibration.validate import Bench
        from calibration.validate import validate as compare

        bench = Bench(device)
        told = []
        for file, scenario, costs in inputs:
            with _blame(file), _progress(f"validating {file.name}") as progress:
                predicted, measured = compare(
                    scenario, costs, device, repeats=repeats, progress=progress, bench=bench, base=file.parent
                )
            told.append(validation_json(predicted, measured))
            folder = out / file.stem if out is not None and len(files) > 1 else out
            _tell(told[-1], predicted, measured, folder, as_json=False, quiet=as_json)
        if as_json:
            _print_json(told[0] if len(told) == 1 else told)


@app.command()
def tiles(
    file: ScenarioFile,
    sets: Sets = None,
    profile: ProfileName = None,
    device: Annotated[str | None, typer.Option(metavar="cuda", help="Measure on this device as well.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write result.json and report.html into this folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare the ways to synchronise the tiles of dependent kernels."""
    with _outcome():
        if device not in (None, "cuda"):
            raise InputError("--device", "", shown(device), "cuda")
        _check_folder(out)
        from batchsim.refusal import Override
        from batchsim.tiles.scenario import load

        overrides: list[str | Override] = list(sets or ())
        if profile is not None:
            overrides.append(Override("--profile", ("profile",), profile))
        scenario = load(file, overrides)
        if device is not None:
            _need_cuda()

        from batchsim.tiles.profile import load_tile_profile
        from batchsim.tiles.result import compare_all

        costs = load_tile_profile(scenario.profile, Path() if profile is not None else file.parent)
        with _blame(file), _progress(f"simulating {file.name}") as progress:
            found = compare_all(scenario, costs, tell=progress)
        if device is not None:
            from calibration.tile_trace import measure

            with _progress(f"measuring {file.name}") as progress:
                found = found.with_measured(lambda case: measure(case), tell=progress)
        if as_json:
            _print_json(found.to_json())
        else:
            from rich.console import Console

            from batchsim.tiles.report import print_tiles

            print_tiles(Console(), found)
        if out is not None:
            from batchsim.files import write_json
            from batchsim.tiles.report import write_tiles_report

            write_json(out / "result.json", found.to_json())
            write_tiles_report(out / "report.html", found)
            typer.echo(f"wrote {out}: result.json, report.html", err=True)


@app.command()
def calibrate(
    model: Annotated[str, typer.Option(metavar="NAME", help="The model's shape, as llama-3.1-8b.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The profile to write, JSON.")],
    device: Device = "cuda",
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="How often each cell of the grid is run.")] = 2,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted calibration.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a finished or interrupted one.")] = False,
) -> None:
    """Measure a device and this host, and write a profile."""
    with _outcome():
        from batchsim.model import MODELS
        from batchsim.refusal import choice

        if model not in MODELS:
            raise InputError("--model", "", shown(model), choice(model, list(MODELS)))
        if resume and force:
            raise InputError("--resume", "", "--force as well", "one of the two")
        if out.is_dir():
            raise InputError("--out", "", f"the folder {out}", "a file")
        partial = out.with_name(f"{out.name}.partial")
        if out.exists() and not force:
            raise InputError("--out", "", f"a finished profile {out}", "a new file, or --force")
        if partial.exists() and not (resume or force):
            raise InputError("--out", "", f"an interrupted calibration {partial}", "--resume or --force")
        _check_device(device)
        _need_torch()
        with _progress(f"calibrating {model}") as progress:
            from calibration.calibrate import calibrate as measure

            measure(model, device, out, rounds=rounds, resume=resume, progress=progress)
        typer.echo(f"wrote {out}", err=True)


@app.command()
def schema() -> None:
    """Print the JSON schema of a scenario, for editors."""
    with _outcome():
        from batchsim.scenario import scenario_json_schema

        typer.echo(json.dumps(scenario_json_schema(), indent=2, sort_keys=True))


@contextmanager
def _outcome() -> Iterator[None]:
    """Turns what can happen to a command into a sentence on stderr and an exit code."""
    try:
        yield
        sys.stdout.flush()
    except InputError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(REFUSED) from None
    except RunError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except OSError as error:
        if error.errno == errno.EPIPE:
            # Whoever read the output has left; the interpreter's last flush must not complain either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(PIPE_CLOSED) from None
        if error.filename is None:
            raise
        typer.echo(f"{error.filename}: {error.strerror}", err=True)
        raise typer.Exit(FAILED) from None


@contextmanager
def _blame(file: Path) -> Iterator[None]:
    """Names `file` in refusals by code that knows only the scenario."""
    try:
        yield
    except InputError as error:
        raise error.within(str(file)) from None


@contextmanager
def _progress(label: str) -> Iterator[Tell | None]:
    """A bar on a terminal's stderr, told the fraction done and perhaps at what; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(label), total=1.0)

        def tell(fraction: float | None, what: str | None = None) -> None:
            bar.update(task, completed=fraction, description=None if what is None else escape(what))

        yield tell


def _read(
    file: Path, sets: Sequence[str] | None, schedules: str | None, profile: str | None
) -> tuple[Scenario, Profile]:
    from batchsim.refusal import Override
    from batchsim.scenario import load

    overrides: list[str | Override] = list(sets or ())
    if schedules is not None:
        names = [name.strip() for name in schedules.split(",")]
        overrides.append(Override("--schedules", ("schedules",), names))
    if profile is not None:
        overrides.append(Override("--profile", ("profile",), profile))
    scenario = load(file, overrides)
    if scenario.tile_profile is not None and (beside := file.parent / scenario.tile_profile).is_file():
        scenario = scenario.model_copy(update={"tile_profile": str(beside)})

    from batchsim.profile import load_profile

    return scenario, load_profile(scenario.profile, Path() if profile is not None else file.parent)


def _tell(
    value: dict[str, Any], predicted: Run, measured: Run | None, out: Path | None, as_json: bool, quiet: bool = False
) -> None:
    """Prints a result, as JSON or as tables unless `quiet`, and writes it into `out`."""
    if as_json:
        _print_json(value)
    elif not quiet:
        from rich.console import Console

        from batchsim.report import print_run

        print_run(Console(), predicted, measured)
    if out is None:
        return
    from batchsim.files import write_json
    from batchsim.report import write_report
    from batchsim.timeline import write_trace

    write_json(out / "result.json", value)
    write_report(out / "report.html", predicted, measured)
    write_trace(out / "trace.json", [predicted] if measured is None else [predicted, measured])
    told = "result.json, report.html, trace.json (open in https://ui.perfetto.dev)"
    if predicted.served:
        from batchsim.requests_file import write_requests

        write_requests(out / "requests.parquet", predicted.served)
        told += ", requests.parquet"
    typer.echo(f"wrote {out}: {told}", err=True)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, allow_nan=False))


def _check_folder(out: Path | None) -> None:
    if out is not None and out.exists() and not out.is_dir():
        raise InputError("--out", "", f"a file {out}", "a folder")


def _check_device(device: str) -> None:
    if device not in ("cuda", "cpu"):
        raise InputError("--device", "", shown(device), "cuda or cpu")


def _need_torch() -> None:
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise RunError("measuring a device needs torch: pip install 'batchsim[gpu]'")


def _need_cuda() -> None:
    _need_torch()
    import torch

    if not torch.cuda.is_available():
        raise RunError("no CUDA device was found; measure tiles on a machine with one")
