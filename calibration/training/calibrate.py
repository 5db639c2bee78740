"""Measure training one model on one machine and fit a profile.

The executor itself is what is measured: it runs a few consecutive optimiser steps of the very loops that it will run
later, over a grid of micro-batches, in rounds.

python -m calibration.training.calibrate --model llama-160m --device cuda --out calibration/profiles/training

With --extend only the device cells are measured that the profile in the folder lacks, and it is fitted anew.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from batchsim.files import write_text
from batchsim.model import TRAINED
from batchsim.schedules.training import TRAINING_SCHEDULES
from batchsim.training_profile import PARTS, TrainingProfile, load_training_profile
from calibration.device import prepare
from calibration.provenance import MACHINE_KEYS, QuietCore, provenance
from calibration.training.cells import CPU, GPU, Cell, Grid
from calibration.training.executor import Execution, Part, TrainingExecutor, Work
from calibration.training.fit import fit_profile, profile_text, refit
from calibration.training.launches import count_launches
from calibration.training.threads import follow
from calibration.training.trainer import Precision, Trainer, build_optimizer

Progress = Callable[[str], None]
LONG_STEP_S = 0.7  # steps that take longer are measured in the first round alone
MOST_STEPS = 40
HOST_KEPT, DEVICE_KEPT = 64, 9  # samples that a profile keeps of a cell in a round
HOST_STEPS = 6
# A device that is this much slower than its host never waits for it in a loop that prefetches.
DEVICE_BOUND = 1.5


def calibrate(
    model: str, device: str, out: Path, *, precisions: Sequence[Precision] = ("mixed",), rounds: int = 2,
    grid: Grid | None = None, progress: Progress | None = None,
) -> TrainingProfile:  # fmt: skip
    """Measure `model` on `device` (`cuda` or `cpu`), write the profile to `out` and return it.

    What does not fit the device's memory is left out.

    Raises:
        RunError: no such device.
    """
    prepare(device, "calibrate")
    grid = grid or (GPU if device == "cuda" else CPU)
    names = ",".join(precisions)
    command = f"python -m calibration.training.calibrate --device {device} --model {model} --precisions {names}"
    facts = provenance(device, f"{command} --rounds {rounds}")
    entries: list[dict[str, Any]] = []
    launches: dict[str, Any] = {}
    memory = torch.cuda.mem_get_info()[1] if device == "cuda" else 2 << 30
    for precision in precisions:
        bench = _Bench(model, device, precision, grid, grid.cells(precision), progress)
        launches[precision] = count_launches(bench.trainer, grid.host_length)
        trip_ns = bench.round_trip_ns()
        for number in range(rounds):
            bench.measure(number)
            # Written after every round: an interrupted calibration loses one at most.
            profile = fit_profile(
                entries + bench.entries, launches, name=out.stem, model=model, facts=facts | {"rounds": rounds},
                device_memory_bytes=memory, overlaps=device == "cuda", layers=TRAINED[model].num_layers,
                round_trip_ns=trip_ns, base_length=grid.base_length,
            )  # fmt: skip
            write_text(out, profile_text(profile))
        entries += bench.entries
        del bench
        _free(device)
    return profile


def extend(
    out: Path, device: str, *, precisions: Sequence[Precision] = ("mixed",), grid: Grid | None = None,
    progress: Progress | None = None,
) -> TrainingProfile:  # fmt: skip
    """Measure the device cells of the grid that the profile at `out` lacks, fit it anew, write it and return it.

    Raises:
        InputError: there is no such profile.
        RunError: no such device.
    """
    prepare(device, "calibrate")
    profile = load_training_profile(str(out))
    grid = grid or (GPU if device == "cuda" else CPU)
    measured = [entry["cell"] for entry in profile.cells]
    entries: list[dict[str, Any]] = []
    for precision in precisions:
        missing = _missing(grid.cells(precision), measured)
        fit = profile.precisions[precision]
        bench = _Bench(profile.model, device, precision, grid, missing, progress)
        bench.host_ns = {
            kind: {part: launches.host.at(first=False) for part, launches in parts.items()}
            | {"optimizer": fit.optimizers["adamw"].host.ns}
            for kind, parts in fit.host.items()
        }
        bench.measure(0)
        entries += bench.entries
        del bench
        _free(device)
    command = f"python -m calibration.training.calibrate --device {device} --model {profile.model} --extend"
    facts = provenance(device, f"{command} --precisions {','.join(precisions)}")
    extended = [
        *profile.provenance.get("extended", ()),
        {key: facts.get(key) for key in ("date", "command", *MACHINE_KEYS)},
    ]
    changes = {"cells": [*profile.cells, *entries], "provenance": profile.provenance | {"extended": extended}}
    profile = refit(profile.model_copy(update=changes))
    write_text(out, profile_text(profile))
    return profile


def _missing(cells: Sequence[Cell], measured: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """The device cells that have not been measured and are no larger than those that fitted the device."""

    def fits(cell: Cell) -> bool:
        alike = [each for each in measured if each["purpose"] == "device" and each["precision"] == cell.precision]
        alike = [each for each in alike if each["checkpointing"] == cell.checkpointing]
        largest: int = max(each["micro_batch"] * each["sequence_length"] for each in alike)
        return cell.tokens <= largest

    return [cell for cell in cells if cell.purpose == "device" and cell.to_json() not in measured and fits(cell)]


class _Bench:
    """A trainer of one precision, and what was measured with it."""

    def __init__(
        self, model: str, device: str, precision: Precision, grid: Grid, cells: Sequence[Cell],
        progress: Progress | None,
    ) -> None:  # fmt: skip
        self.device, self.grid, self.cells = device, grid, cells
        self.trainer = Trainer(TRAINED[model], device, precision=precision)
        self.executor = TrainingExecutor(self.trainer)
        self.entries: list[dict[str, Any]] = []
        self._slow: set[Cell] = set()
        self._tell = progress or (lambda _: None)
        self.host_ns: dict[str, dict[str, float]] = {}

    def measure(self, number: int) -> None:
        """One round over all cells."""
        if number == 0:
            self._warm_up()
        with QuietCore(move=self.device == "cuda") as core:
            for cell in self.cells:
                if cell in self._slow:
                    continue
                core.settle()
                follow()
                started = time.monotonic()
                try:
                    self._measure(cell, number)
                except torch.cuda.OutOfMemoryError:
                    self._slow.add(cell)
                    self.trainer.optimizer.zero_grad(set_to_none=True)
                    _free(self.device)
                    self._tell(f"{cell}: does not fit")
                else:
                    self._tell(f"round {number} {cell}: {time.monotonic() - started:.2f} s")
        follow()

    def round_trip_ns(self, repeats: int = 200) -> float:
        """From a launch on an idle device to the host's waking up, without the call and the kernel."""
        if self.device != "cuda":
            return 0.0
        word, calls, waits = torch.zeros(1, device="cuda"), [], []
        for _ in range(repeats):
            torch.cuda.synchronize()
            start = time.perf_counter_ns()
            word.add_(1)
            launched = time.perf_counter_ns()
            torch.cuda.synchronize()
            waits.append(time.perf_counter_ns() - start)
            calls.append(launched - start)
        return round(float(np.median(waits) - np.median(calls)), 1)

    def _warm_up(self) -> None:
        """Load kernels and libraries, make the optimiser's state, and warm the device up."""
        for checkpointing in ("none", "full"):
            self.trainer.checkpointing = checkpointing
            self._run("sync", Work(2, 2, 1, self.grid.host_length))
        self.trainer.checkpointing = "none"
        length = self.grid.base_length
        until = time.monotonic() + (1.0 if self.device == "cuda" else 0.0)
        while time.monotonic() < until:
            self._run("async", Work(2, 2, self.grid.length_tokens // length, length))

    def _measure(self, cell: Cell, number: int) -> None:
        self.trainer.checkpointing = cell.checkpointing
        match cell.purpose:
            case "host":
                self._host(cell)
            case "optimizer":
                if number == 0:
                    self._optimizer(cell)
            case "device":
                self._device(cell)

    def _host(self, cell: Cell) -> None:
        work = Work(HOST_STEPS, cell.accumulation_steps, cell.micro_batch, cell.sequence_length)
        for schedule in ("async", "sync"):
            found = self._run(schedule, work)
            self._keep(cell, found, schedule=schedule)
        # Of the sync loop, and as most micro-batches are: not a step's first.
        middle = {part: float(np.median(ns)) for (part, first), ns in found.parts_host_ns.items() if not first}
        self.host_ns[cell.checkpointing] = middle

    def _optimizer(self, cell: Cell) -> None:
        own = self.trainer.optimizer
        self.trainer.optimizer = build_optimizer(self.trainer.model, cell.optimizer)
        work = Work(HOST_STEPS, 1, cell.micro_batch, cell.sequence_length)
        try:
            self._run("sync", Work(2, 1, cell.micro_batch, cell.sequence_length))
            asleep = round(2 * self.host_ns["none"]["optimizer"])
            self._keep(cell, self._run("sync", work, timed=True, ahead_ns=(0, 0, asleep)))
        finally:
            self.trainer.optimizer = own

    def _device(self, cell: Cell) -> None:
        """In steps one after the other; where the device would wait for the host, behind a device that sleeps."""
        if self.device == "cuda":
            _free(self.device)
        one = Work(1, cell.accumulation_steps, cell.micro_batch, cell.sequence_length)
        self._run("async", one)
        step_ns = self._run("async", one).total_ns
        steps = min(max(math.ceil(self.grid.seconds * 1e9 / step_ns), 2), MOST_STEPS)
        if step_ns > LONG_STEP_S * 1e9:
            self._slow.add(cell)
        work = Work(steps, cell.accumulation_steps, cell.micro_batch, cell.sequence_length)
        retries = _retries(self.device)
        if self.device == "cuda":
            self._run("async", work)  # the clock falls under load
        found = self._run("async", work, timed=True)
        host = self.host_ns[cell.checkpointing]
        micro_ns = sum(
            float(np.median(ns)) for (part, first), ns in found.parts_device_ns.items() if part in PARTS and not first
        )
        ahead = self.device == "cuda" and micro_ns < DEVICE_BOUND * sum(host[part] for part in PARTS)
        if ahead:
            forward, backward = host["layers"] + host["head"], host["head_backward"] + host["layers_backward"]
            asleep = [round(1.5 * ns) for ns in (forward, backward, host["optimizer"])]
            work = Work(min(steps, 6), cell.accumulation_steps, cell.micro_batch, cell.sequence_length)
            found = self._run("sync", work, timed=True, ahead_ns=asleep)
        self._keep(cell, found, ahead=ahead, retries=_retries(self.device) - retries)

    def _run(self, schedule: str, work: Work, *, timed: bool = False, ahead_ns: Sequence[int] = (0, 0, 0)) -> Execution:
        return self.executor.run(TRAINING_SCHEDULES[schedule](), work, timed=timed, ahead_ns=ahead_ns)

    def _keep(self, cell: Cell, found: Execution, **more: Any) -> None:
        entry: dict[str, Any] = {"cell": cell.to_json(), "steps": len(found.steps_ns), **more}
        if cell.purpose == "device":
            entry["calls"] = {"prepare": _kept(found.host_ns["prepare"], DEVICE_KEPT)}
            copies = [span.duration_ns for span in found.spans if span.lane == "copy_in"]
            entry["copies"] = _kept(copies, DEVICE_KEPT)
        else:
            entry["host"] = {_key(part): _kept(ns, HOST_KEPT) for part, ns in found.parts_host_ns.items()}
            entry["calls"] = {phase: _kept(ns, HOST_KEPT) for phase, ns in found.host_ns.items()}
        if cell.purpose != "host":
            entry["device"] = {_key(part): _kept(ns, DEVICE_KEPT) for part, ns in found.parts_device_ns.items()}
        self.entries.append(entry)


def _key(part: Part) -> str:
    name, first = part
    return f"{name}/{'first' if first else 'later'}"


def _kept(samples: Sequence[int], most: int) -> list[int]:
    """The samples, or of more than so many their quantiles, evenly spaced."""
    if len(samples) <= most:
        return list(samples)
    found: list[int] = np.quantile(samples, (np.arange(most) + 0.5) / most).astype(int).tolist()
    return found


def _retries(device: str) -> int:
    """How often the allocator had to give memory back to find some."""
    return int(torch.cuda.memory_stats().get("num_alloc_retries", 0)) if device == "cuda" else 0


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="A shape of batchsim.model.TRAINED.")],
    out: Annotated[Path, typer.Option(help="Folder for the profile.")],
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    precisions: Annotated[str, typer.Option(help="mixed, bf16, fp32, or several with commas.")] = "mixed",
    rounds: Annotated[int, typer.Option(help="How often every cell is measured.")] = 2,
    name: Annotated[str, typer.Option(help="Name of the profile; default: h200-train-MODEL on a GPU.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="A few small cells alone, to try it out.")] = False,
    more: Annotated[bool, typer.Option("--extend", help="Only what the profile in the folder lacks.")] = False,
) -> None:
    """Measure a model, and write its profile of training."""
    stem = name or f"{'h200' if device == 'cuda' else 'cpu'}-train-{model}"
    path = out / f"{stem}.json"
    chosen: Any = tuple(precisions.split(","))
    grid = CPU if quick else None
    if more:
        extend(path, device, precisions=chosen, grid=grid, progress=typer.echo)
    else:
        calibrate(model, device, path, precisions=chosen, rounds=rounds, grid=grid, progress=typer.echo)


if __name__ == "__main__":
    sys.exit(app())
