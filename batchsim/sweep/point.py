"""One point of a sweep: run, and told as the bytes of its file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchsim.errors import BatchSimError
from batchsim.evaluate import evaluate

if TYPE_CHECKING:
    from batchsim.result import Run

SCHEMA_VERSION = 1
# What the errors of points name, wherever the scenario came from: results do not tell of places.
SCENARIO = "scenario"
QUANTILES = 101
# What the machine lacked at that moment, and no result of the point: another time it may well run.
PASSING = (MemoryError, OSError)
# Milliseconds to so many decimals: nanoseconds.
_DECIMALS = 6


@dataclass(frozen=True, slots=True)
class Task:
    """One point to run: what names it, its swept fields, its scenario, where that one's files lie, and how often costs
    are drawn for intervals. `refused`: why it is not run at all."""

    hash: str
    fields: dict[str, Any]
    document: dict[str, Any]
    base: Path
    draws: int
    refused: str | None = None


def told(task: Task) -> bytes:
    """The content of a point's file. Whatever goes wrong with the point is recorded there; the same task gives the same
    bytes, on any machine, in any folder.

    Raises:
        PASSING: it could not be run here and now.
        KeyboardInterrupt: it was interrupted.
    """
    if task.refused is not None:
        return failed(task, task.refused)
    try:
        run = evaluate(task.document, file=SCENARIO, base=task.base, draws=task.draws)
        return _content(task, run=_json(run))
    except BatchSimError as error:
        return failed(task, _placeless(str(error), task.base))
    except PASSING:
        raise
    except Exception as error:  # a mistake of ours: the other points are not to blame
        return failed(task, f"{type(error).__name__}: {error}".removesuffix(": "))


def failed(task: Task, error: str) -> bytes:
    """The content of the file of a point that could not be run."""
    return _content(task, error=error)


def _placeless(text: str, base: Path) -> str:
    """An error without the folder that the scenario's files lie in."""
    return text if base == Path() else text.replace(f"{base}{os.sep}", "")


def _content(task: Task, *, run: dict[str, Any] | None = None, error: str | None = None) -> bytes:
    told = {"schema_version": SCHEMA_VERSION, "hash": task.hash, "fields": task.fields}
    empty: dict[str, Any] = {"run": None, "error": error, "cdf": {}, "window": {}}
    return (json.dumps(told | empty | (run or {}), allow_nan=False, separators=(",", ":")) + "\n").encode()


def _json(run: Run) -> dict[str, Any]:
    from batchsim.result import run_json

    windows = {name: [list(span[:5]) for span in spans] for name, spans in run.windows.items()}
    return {"run": run_json(run), "cdf": cumulative(run), "window": windows}


def cumulative(run: Run) -> dict[str, dict[str, list[float]]]:
    """Of each schedule and latency the quantiles from 0 to 1, milliseconds; of what has no samples none."""
    import numpy as np

    from batchsim.latency import after_warm_up, quantiles, request_latencies

    shares = np.linspace(0, 1, QUANTILES)
    found: dict[str, dict[str, list[float]]] = {}
    for name, served in run.served.items():
        samples = request_latencies(served, after_warm_up(served))
        found[name] = {key: _ms(quantiles(values, shares)) for key, values in samples.items() if len(values)}
        if len(served.itl_ns):
            found[name]["itl"] = _ms(quantiles(served.itl_ns, shares, served.itl_count))
    for name, answered in run.answered.items():
        parts = answered.latencies(answered.after_warm_up())
        found[name] = {key: _ms(quantiles(values, shares)) for key, values in parts.items() if len(values)}
    return found


def _ms(values_ns: Any) -> list[float]:
    return [round(value / 1e6, _DECIMALS) for value in values_ns.tolist()]
