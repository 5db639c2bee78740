"""What commands have in common: how they read, refuse, show progress, tell and write; and how they end."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchsim.errors import InputError, RunError, shown

if TYPE_CHECKING:
    from typing import Protocol

    from rich.console import Console

    from batchsim.kinds import AnyProfile, AnyScenario, Kind
    from batchsim.result import Run

    class Answer(Protocol):
        def to_json(self) -> dict[str, Any]: ...

    class Tell(Protocol):
        def __call__(self, fraction: float | None, what: str = ...) -> None: ...


# Options and arguments that several commands have.
ScenarioFile = Annotated[Path, typer.Argument(metavar="FILE", help="A scenario in YAML.", show_default=False)]
Schedules = Annotated[
    str | None, typer.Option(metavar="NAMES", help="Schedules in place of the file's, as sync,async.")
]
ProfileName = Annotated[
    str | None, typer.Option("--profile", metavar="NAME|FILE", help="A profile in place of the file's.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]

# Exit codes; 0 is done.
FAILED, REFUSED, INTERRUPTED, PIPE_CLOSED = 1, 2, 130, 141


@contextmanager
def outcome() -> Iterator[None]:
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
def blame(file: Path) -> Iterator[None]:
    """Names `file` in refusals by code that knows only the scenario."""
    try:
        yield
    except InputError as error:
        raise error.within(str(file)) from None


@contextmanager
def progress_bar(label: str) -> Iterator[Tell | None]:
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


def read(
    file: Path, sets: Sequence[str] | None, schedules: str | None, profile: str | None
) -> tuple[Kind, AnyScenario, AnyProfile]:
    from batchsim.evaluate import placed_in
    from batchsim.kinds import kind_of
    from batchsim.refusal import Override

    kind = kind_of(file)
    overrides: list[str | Override] = list(sets or ())
    if schedules is not None:
        names = [name.strip() for name in schedules.split(",")]
        overrides.append(Override("--schedules", ("schedules",), names))
    if profile is not None:
        overrides.append(Override("--profile", ("profile",), profile))
    scenario = placed_in(kind.load(file, overrides), file.parent)
    return kind, scenario, kind.costs(scenario, Path() if profile is not None else file.parent)


def tell(
    value: dict[str, Any], predicted: Run, measured: Run | None, out: Path | None, as_json: bool, quiet: bool = False
) -> None:
    """Prints a result, as JSON or as tables unless `quiet`, and writes it into `out`."""
    if as_json:
        print_json(value)
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


def give(
    found: Answer, out: Path | None, name: str, *, as_json: bool, show: Callable[[Console], None],
    report: Callable[[Path], None],
) -> None:  # fmt: skip
    """Prints what a command found, as JSON or by `show`; into `out` goes its JSON, as `name`, and a `report`."""
    if as_json:
        print_json(found.to_json())
    else:
        from rich.console import Console

        show(Console())
    if out is not None:
        from batchsim.files import write_json

        write_json(out / name, found.to_json())
        report(out / "report.html")
        typer.echo(f"wrote {out}: {name}, report.html", err=True)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, allow_nan=False))


def check_folder(out: Path | None) -> None:
    if out is not None and out.exists() and not out.is_dir():
        raise InputError("--out", "", f"a file {out}", "a folder")


def check_device(device: str) -> None:
    if device not in ("cuda", "cpu"):
        raise InputError("--device", "", shown(device), "cuda or cpu")


def need_torch() -> None:
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise RunError("measuring a device needs torch: pip install 'batchsim[gpu]'")


def need_cuda() -> None:
    need_torch()
    import torch

    if not torch.cuda.is_available():
        raise RunError("no CUDA device was found; measure tiles on a machine with one")
