"""From the samples of a calibration's cells to a training profile; its stored cells can be fitted again.

python -m calibration.training.fit calibration/profiles/training/h200-train-llama-160m.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from scipy.optimize import nnls

from batchsim.files import write_text
from batchsim.training_profile import (
    PARTS,
    HostFit,
    Launches,
    OptimizerFit,
    PrecisionFit,
    TokenFit,
    TrainingProfile,
    load_training_profile,
)
from calibration.fit import bin_means, split_outliers
from calibration.training.device_cells import DeviceCells, Entry, settled

Counts = Mapping[str, Mapping[str, Mapping[str, Sequence[int]]]]  # launches by precision, checkpointing and part
CALLS = ("schedule", "copy_in", "record", "stream_wait", "read_loss")


def fit_profile(
    entries: Sequence[Entry], launches: Counts, *, name: str, model: str, facts: dict[str, Any],
    device_memory_bytes: int, overlaps: bool, layers: int, round_trip_ns: float, base_length: int,
) -> TrainingProfile:  # fmt: skip
    """The profile of all that was measured; its `cells` hold the samples, their host times summarised."""
    calls = {phase: host_fit(ns for entry in entries for ns in entry["calls"].get(phase, ())) for phase in CALLS}
    # A wait for what is over already; most waits are not.
    waits = [ns for entry in entries for ns in entry["calls"].get("wait", ())]
    calls["wait"] = HostFit(ns=round(float(np.quantile(waits, 0.05)), 1), samples=len(waits))
    return TrainingProfile(
        schema_version=1,
        kind="training_profile",
        name=name,
        model=model,
        provenance=facts | {"launches": launches, "base_length": base_length},
        device_memory_bytes=device_memory_bytes,
        overlaps=overlaps,
        layers=layers,
        prepare=_growing(entries, lambda entry: entry["calls"].get("prepare", ())),
        copy_in_device=_growing(entries, lambda entry: entry.get("copies", ())),
        calls=calls,
        round_trip_ns=round_trip_ns,
        precisions={
            precision: _fit_precision(
                [entry for entry in entries if entry["cell"]["precision"] == precision], counts, base_length
            )
            for precision, counts in launches.items()
        },
        cells=[dict(entry) for entry in entries],
    )


def host_fit(samples: Iterable[float], later: Iterable[float] = ()) -> HostFit:
    """Mean and ratios of `samples`; what `later` ones take more on average."""
    kept, outliers = split_outliers(list(samples))
    mean = max(float(kept.mean()), 1.0)
    more = [float(split_outliers(values)[0].mean()) - mean for values in (list(later),) if values]
    return HostFit(
        ns=round(mean, 1),
        later_ns=round(sum(more), 1),
        ratios=bin_means(kept / mean),
        samples=len(kept),
        outliers=len(outliers),
        outlier_ns=float(outliers.sum()),
    )


def _growing(entries: Sequence[Entry], samples: Any) -> TokenFit:
    """Non-negative least squares of the cells' medians, in relative terms, over sequences and tokens."""
    rows, medians = [], []
    for entry in entries:
        if len(values := samples(entry)):
            cell = entry["cell"]
            rows.append((1.0, cell["micro_batch"], cell["micro_batch"] * cell["sequence_length"]))
            medians.append(max(float(np.median(values)), 1.0))
    table, ns = np.array(rows), np.array(medians)
    terms, _ = nnls(table / ns[:, None], np.ones(len(ns)))
    ratios = ns / np.maximum(table @ terms, 1.0)
    return TokenFit(
        call_ns=round(float(terms[0]), 1), sequence_ns=round(float(terms[1]), 2), token_ns=round(float(terms[2]), 5),
        ratios=bin_means(ratios, 16),
    )  # fmt: skip


def _fit_precision(entries: Sequence[Entry], launches: Mapping[str, Any], base_length: int) -> PrecisionFit:
    device = DeviceCells([entry for entry in entries if entry["cell"]["purpose"] == "device"], base_length)
    host = {kind: _host_parts(entries, kind, launches[kind]) for kind in ("none", "full")}
    return PrecisionFit(
        host=host,
        lead=_lead(entries, host["none"]["layers"].host.ns),
        device=device.curves(),
        recompute=device.recompute,
        accumulate_ns=device.accumulate_ns,
        optimizers=_optimizers(entries, launches["none"]["optimizer"][0]),
        residuals=device.residuals(),
    )


def _host_parts(entries: Sequence[Entry], kind: str, launches: Mapping[str, Sequence[int]]) -> dict[str, Launches]:
    """Of the sync loop, where no part waits for a full queue."""
    mine = [
        entry["host"]
        for entry in entries
        if (entry["cell"]["purpose"], entry["cell"]["checkpointing"], entry.get("schedule")) == ("host", kind, "sync")
    ]
    found = {}
    for part in PARTS:
        first, later = ([ns for each in mine for ns in each[f"{part}/{which}"]] for which in ("first", "later"))
        # Most micro-batches are later ones: theirs is the distribution, and only the mean of first ones is another.
        fit = host_fit(later, first)
        fit = fit.model_copy(update={"ns": round(fit.ns + fit.later_ns, 1), "later_ns": -fit.later_ns})
        found[part] = Launches(first=launches[part][0], later=launches[part][1], host=fit)
    return found


def _lead(entries: Sequence[Entry], host_ns: float) -> float:
    """What a run's very first micro-batch takes longer in the layers, its device idle: a share of the host's time.

    Small cells that are bound by the device tell best; the clock, which falls under load, hides it in large ones.
    """
    more = []
    for entry in sorted(entries, key=lambda each: each["cell"]["micro_batch"] * each["cell"]["sequence_length"]):
        cell = entry["cell"]
        if cell["purpose"] == "device" and cell["checkpointing"] == "none" and not entry.get("ahead", True):
            first, later = (entry["device"].get(f"layers/{which}", []) for which in ("first", "later"))
            if len(settled(first, entry["steps"])) < len(first):
                more.append((first[0] - float(np.median([*first[1:], *later]))) / host_ns)
    return round(min(max(float(np.median(more[:9])), 0.0), 1.0), 4) if more else 0.0


def _optimizers(entries: Sequence[Entry], launches: int) -> dict[str, OptimizerFit]:
    cells = {entry["cell"]["optimizer"]: entry for entry in entries if entry["cell"]["purpose"] == "optimizer"}
    steps = [entry for entry in entries if entry["cell"]["purpose"] == "host" and entry.get("schedule") == "sync"]
    steps = [entry for entry in steps if entry["cell"]["checkpointing"] == "none"]
    found = {}
    for kind, entry in cells.items():
        host = {}
        for part in _OF_A_STEP:
            # A cell is measured behind a device that sleeps and a mark; how much longer the host takes in a step that
            # has neither is told by the optimiser of the other cells.
            alone, own = _of_part(cells["adamw"], part), _of_part(entry, part)
            loop = [ns for each in steps for ns in _of_part(each, part)]
            times = float(np.median(loop) / np.median(alone)) if loop else 1.0
            host[part] = host_fit([ns * times for ns in own])
        ns = next(v for k, v in entry["device"].items() if k.startswith("optimizer"))
        found[kind] = OptimizerFit(
            launches=launches,
            host=host["optimizer"],
            zero_grad=host["zero_grad"],
            device_ns=round(float(np.median(ns)), 1),
        )
    return found


def _of_part(entry: Entry, part: str) -> list[float]:
    """Host times of a part that a step has once."""
    return [ns for key, samples in entry["host"].items() if key.startswith(part) for ns in samples]


_OF_A_STEP = ("optimizer", "zero_grad")


def profile_text(profile: TrainingProfile) -> str:
    """JSON with a line for each top-level key, and one for each cell."""
    content = profile.model_dump(mode="json")
    cells = ",\n  ".join(json.dumps(cell, separators=(",", ":")) for cell in content.pop("cells"))
    lines = [f" {json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in content.items()]
    return "{\n" + ",\n".join([*lines, f' "cells": [\n  {cells}\n ]']) + "\n}\n"


def refit(profile: TrainingProfile) -> TrainingProfile:
    """The same cells fitted anew."""
    facts = dict(profile.provenance)
    launches, base_length = facts.pop("launches"), facts.pop("base_length")
    return fit_profile(
        profile.cells, launches, name=profile.name, model=profile.model, facts=facts,
        device_memory_bytes=profile.device_memory_bytes, overlaps=profile.overlaps, layers=profile.layers,
        round_trip_ns=profile.round_trip_ns, base_length=base_length,
    )  # fmt: skip


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(paths: Annotated[list[Path], typer.Argument(help="Profiles to fit anew, in place.")]) -> None:
    """Fit profiles again from the cells that they hold."""
    for path in paths:
        write_text(path, profile_text(refit(load_training_profile(str(path)))))


if __name__ == "__main__":
    sys.exit(app())
