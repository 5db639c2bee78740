"""Measure pairs of loops: python -m calibration.pairs run --out DIR [--set fit|test] [--only NAME] [--rounds N]"""

from __future__ import annotations

import faulthandler
import gc
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from batchsim.command import outcome
from batchsim.errors import InputError
from batchsim.files import write_text
from calibration.device import prepare
from calibration.pairs.catalogue import PAIRS, SETS
from calibration.pairs.loop import Pair
from calibration.pairs.measure import measure, trace_both, traces_of, usable

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def names() -> None:
    """List the pairs: set, name, what asynchrony gave on an H200, and what each is there to show."""
    for name, pairs in SETS.items():
        for pair in pairs:
            typer.echo(f"{name:5} {pair.name:16} {pair.outlook:8} {pair.description}")


@app.command()
@outcome()
def run(
    out: Annotated[Path, typer.Option(help="The folder to write to; what is in it already is left out.")],
    only: Annotated[list[str] | None, typer.Option(help="Only this pair; may be repeated.")] = None,
    chosen: Annotated[str | None, typer.Option("--set", help="Only this set: fit or test.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often the two loops take turns.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of a turn.")] = 60,
    limit: Annotated[int, typer.Option(min=1, help="Seconds after which a pair is given up, and the process.")] = 60,
    device: Annotated[str, typer.Option(help="cuda, or cpu for a trial in small.")] = "cuda",
) -> None:
    """Time both loops of each pair by turns, then trace both.

    A pair leaves NAME.json (step times, gain, whether both loops computed the same), NAME_sync.trace.json.gz and
    NAME_async.trace.json.gz; one that fails leaves NAME.failed.txt and is not tried again.
    """
    if chosen is not None and chosen not in SETS:
        raise InputError("--set", "", f"the unknown set {chosen}", f"one of {', '.join(SETS)}")
    known = {pair.name: pair for pair in (PAIRS if chosen is None else SETS[chosen])}
    if unknown := set(only or ()) - known.keys():
        raise InputError("--only", "", f"the unknown pair {min(unknown)}", f"one of {', '.join(known)}")
    prepare(device, "measure pairs of loops")
    out.mkdir(parents=True, exist_ok=True)
    pairs = [known[name] for name in only or known]
    for pair in pairs:
        if not (out / f"{pair.name}.json").exists():
            _guarded(pair, device, out, limit, partial(_timed, pair, device, out, rounds, steps))
    for pair in pairs:
        if not all(path.exists() for path in traces_of(pair, out)):
            _guarded(pair, device, out, limit, partial(trace_both, pair, device, out))


def _timed(pair: Pair, device: str, out: Path, rounds: int, steps: int) -> None:
    began = time.perf_counter()
    found = measure(pair, device, out, rounds=rounds, steps=steps)
    typer.echo(
        f"{pair.name:16} sync {_listed(found['sync_step_ms'])} async {_listed(found['async_step_ms'])} ms, gain "
        f"{found['gain']:+.1%} ({found['outlook']}), outputs {'equal' if found['equal_outputs'] else 'DIFFER'}, "
        f"{time.perf_counter() - began:.0f} s"
    )


def _guarded(pair: Pair, device: str, out: Path, limit: int, work: Callable[[], None]) -> None:
    """Do `work` on a pair that has not failed before, and tell if it fails now."""
    failed = out / f"{pair.name}.failed.txt"
    if failed.exists():
        return
    # There already if the process is ended from outside, or by its own watchdog.
    write_text(failed, "did not end\n")
    faulthandler.dump_traceback_later(limit, exit=True)
    try:
        work()
    except Exception:
        write_text(failed, traceback.format_exc())
        typer.echo(f"{pair.name:16} failed: {traceback.format_exc(limit=0).strip()}")
        if not usable(device):
            raise typer.Exit(3) from None
    else:
        failed.unlink()
    faulthandler.cancel_dump_traceback_later()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _listed(values: list[float]) -> str:
    return "/".join(f"{value:.3f}" for value in values)


if __name__ == "__main__":
    sys.exit(app())
