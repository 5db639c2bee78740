"""Loops that were run both synchronously and asynchronously: what the trace of the one tells of the other.

python -m calibration.learn_points table calibration/validation/learn/test

A case is `NAME.json`, its measurement, beside `NAME.trace.json.gz`, a few steps of its synchronous loop
(`calibration.trim`). Predicted is the asynchronous step, from that trace and the median of the untraced synchronous
steps alone; `fit` holds the cases that priors were fitted on, `test` those that were measured afterwards.

A gain is of throughput: the synchronous step over the asynchronous one, less one. Its sign is one of gain, loss and
nothing. Measured, it is nothing where it is under 1.5% either way, or where the rounds, in each of which both loops
ran, disagree about its sign; predicted, where it is under 1.5%. The sign is right where the two are the same, so that
nothing predicted for a gain is wrong, and a gain predicted for nothing as well. Counted strictly, it is the sign of the
bare number, however small.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import typer
from pydantic import Field, PositiveFloat, PositiveInt

from batchsim.command import outcome, print_json, progress_bar
from batchsim.errors import InputError
from batchsim.profile import Measured, parsed
from batchsim.whatif import whatif
from calibration.kineto import read_trace
from calibration.learn import learn

NOTHING = 0.015
NEAR = 0.05
HEADER = """\
| case | sync ms | async ms | predicted | 90% interval | error | gain | predicted | sign | held |
|---|--:|--:|--:|--:|--:|--:|--:|---|---|"""
FOOTER = f"""\
Gains are of throughput, sync step / async step - 1. A sign is gain, loss or nothing: under {NOTHING:.1%} either way,
measured also where the rounds disagree about it (marked ~). Strictly: the bare sign, however small the gain.
A width is that of the interval, in % of the measured step."""

Sign = Literal["gain", "nothing", "loss"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class TraceFile(Measured):
    """The trace beside a case, and how many steps are learned from it."""

    file: str
    steps_learned: PositiveInt


class Case(Measured):
    """A loop and its asynchronous twin as measured: the untraced step of each in every round, milliseconds.

    A round is a turn of one after a turn of the other, so that both saw the host alike.
    """

    name: str
    engine: Literal["pairs", "transformers"]
    description: str
    sync_step_ms: list[PositiveFloat] = Field(min_length=1)
    async_step_ms: list[PositiveFloat] = Field(min_length=1)
    settings: dict[str, Any]
    trace: TraceFile
    provenance: dict[str, Any]

    @property
    def sync_ms(self) -> float:
        return median(self.sync_step_ms)

    @property
    def async_ms(self) -> float:
        return median(self.async_step_ms)

    @property
    def rounds_disagree(self) -> bool:
        """Whether asynchrony made the step shorter in some rounds and longer in others."""
        pairs = zip(self.sync_step_ms, self.async_step_ms, strict=True)
        return len({late < sync for sync, late in pairs}) > 1

    @property
    def sign(self) -> Sign:
        return "nothing" if self.rounds_disagree else sign(gain(self.sync_ms, self.async_ms))


@dataclass(frozen=True)
class Predicted:
    """The asynchronous step of a case, milliseconds, and the interval that is to hold it in 9 of 10 cases."""

    case: Case
    step_ms: float
    interval_ms: tuple[float, float]

    @property
    def error(self) -> float:
        """Relative to the measured step; positive where the predicted one is longer."""
        return self.step_ms / self.case.async_ms - 1

    @property
    def held(self) -> bool:
        return self.interval_ms[0] <= self.case.async_ms <= self.interval_ms[1]

    @property
    def width(self) -> float:
        return (self.interval_ms[1] - self.interval_ms[0]) / self.case.async_ms

    @property
    def gains(self) -> tuple[float, float]:
        """Measured and predicted."""
        return gain(self.case.sync_ms, self.case.async_ms), gain(self.case.sync_ms, self.step_ms)

    @property
    def sign_right(self) -> bool:
        return self.case.sign == sign(self.gains[1])

    @property
    def bare_sign_right(self) -> bool:
        measured, predicted = self.gains
        return (measured > 0) == (predicted > 0)


@dataclass(frozen=True)
class Summary:
    """Over all cases: `error` is the median of the errors' sizes, `width` that of the intervals' widths."""

    cases: int
    near: int
    error: float
    worst: float
    signs: int
    bare_signs: int
    held: int
    width: float
    measured: dict[Sign, int]

    @classmethod
    def of(cls, found: Sequence[Predicted]) -> Summary:
        return cls(
            cases=len(found),
            near=sum(abs(one.error) <= NEAR for one in found),
            error=median(abs(one.error) for one in found),
            worst=max((one.error for one in found), key=abs),
            signs=sum(one.sign_right for one in found),
            bare_signs=sum(one.bare_sign_right for one in found),
            held=sum(one.held for one in found),
            width=median(one.width for one in found),
            measured={kind: sum(one.case.sign == kind for one in found) for kind in ("gain", "nothing", "loss")},
        )

    def __str__(self) -> str:
        return (
            f"{self.cases} cases ({', '.join(f'{sign} {count}' for sign, count in self.measured.items())}): "
            f"{self.near} within {NEAR:.0%}, median error {self.error:.1%}, worst {self.worst:+.1%}; "
            f"{self.signs} signs right (strictly {self.bare_signs}); "
            f"{self.held} intervals hold the measured step, median width {self.width:.1%}"
        )


def gain(sync_ms: float, async_ms: float) -> float:
    return sync_ms / async_ms - 1


def sign(of: float) -> Sign:
    return "nothing" if abs(of) < NOTHING else "gain" if of > 0 else "loss"


def read_cases(folder: Path) -> dict[Path, Case]:
    """The cases of a folder, by the path of their traces, in the order of their names.

    Raises:
        InputError: there are none, or one of them is damaged.
    """
    found: dict[Path, Case] = {}
    for path in sorted(folder.glob("*.json")):
        case = parsed(Case, path.read_text(encoding="utf-8"), str(path))
        if len(case.sync_step_ms) != len(case.async_step_ms):
            numbers = f"{len(case.sync_step_ms)} rounds of one loop and {len(case.async_step_ms)} of the other"
            raise InputError(str(path), "async_step_ms", numbers, "as many of both")
        found[path.parent / case.trace.file] = case
    if not found:
        raise InputError(str(folder), "", "no cases", "a folder with NAME.json beside NAME.trace.json.gz")
    return found


def predict(trace: Path, case: Case) -> Predicted:
    """What asynchrony gives a case, by its trace and the median of its synchronous steps."""
    answer = whatif(learn(read_trace(trace), case.sync_ms))
    late = answer.schedules["async"]
    return Predicted(case, late.step_ms, late.step_ms_interval)


def to_json(found: Sequence[Predicted]) -> dict[str, Any]:
    cases = [
        {
            "name": one.case.name,
            "engine": one.case.engine,
            "sync_step_ms": one.case.sync_ms,
            "async_step_ms": one.case.async_ms,
            "predicted_step_ms": one.step_ms,
            "predicted_step_ms_interval": one.interval_ms,
            "error": one.error,
            "throughput_gain": one.gains[0],
            "predicted_throughput_gain": one.gains[1],
            "rounds_disagree": one.case.rounds_disagree,
            "sign": one.case.sign,
            "predicted_sign": sign(one.gains[1]),
            "sign_right": one.sign_right,
            "bare_sign_right": one.bare_sign_right,
            "held": one.held,
        }
        for one in found
    ]
    return {"summary": asdict(Summary.of(found)), "cases": cases}


def row(one: Predicted) -> str:
    """A case's line of the table."""
    case, (measured, predicted) = one.case, one.gains
    low, high = one.interval_ms
    cells = [
        case.name,
        f"{case.sync_ms:.3f}",
        f"{case.async_ms:.3f}",
        f"{one.step_ms:.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{one.error:+.1%}",
        f"{measured:+.1%}{' ~' if case.rounds_disagree else ''}",
        f"{predicted:+.1%}",
        "right" if one.sign_right else f"{sign(predicted)} for {case.sign}",
        "yes" if one.held else "no",
    ]
    return f"| {' | '.join(cells)} |"


@app.callback()
def learned() -> None:
    """Cases of learning from traces, and how far off what is predicted from them is."""


@app.command()
def table(
    folder: Annotated[Path, typer.Argument(help="Folder of cases.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Learn and predict every case of a folder; print the summary and the table."""
    with outcome():
        cases = read_cases(folder)
        with progress_bar("learning") as tell:
            found = predicted_all(cases, tell)
        if as_json:
            print_json(to_json(found))
            return
        for line in (str(Summary.of(found)), "", HEADER, *map(row, found), "", FOOTER):
            typer.echo(line)


def predicted_all(cases: dict[Path, Case], tell: Callable[[float, str], None] | None = None) -> list[Predicted]:
    """All cases predicted; `tell` is told the fraction done and the case that comes."""
    found: list[Predicted] = []
    for trace, case in cases.items():
        if tell is not None:
            tell(len(found) / len(cases), case.name)
        found.append(predict(trace, case))
    return found


if __name__ == "__main__":
    sys.exit(app())
