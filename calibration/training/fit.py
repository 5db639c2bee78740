"""From the samples of a calibration's cells to a training profile; its stored cells can be fitted again.

python -m calibration.training.fit calibration/profiles/training/h200-train-llama-160m.json
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from scipy.optimize import nnls

from batchsim.files import write_text
from batchsim.training_profile import (
    PARTS,
    Curve,
    HostFit,
    Launches,
    OptimizerFit,
    PrecisionFit,
    TokenFit,
    TrainingProfile,
    load_training_profile,
)
from calibration.fit import bin_means, split_outliers

Entry = Mapping[str, Any]  # a cell, what it was measured for, and its samples
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
    device = _Device([entry for entry in entries if entry["cell"]["purpose"] == "device"], base_length)
    return PrecisionFit(
        host={kind: _host_parts(entries, kind, launches[kind]) for kind in ("none", "full")},
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


def _optimizers(entries: Sequence[Entry], launches: int) -> dict[str, OptimizerFit]:
    found = {}
    for entry in entries:
        if entry["cell"]["purpose"] == "optimizer":
            host = {part: next(v for k, v in entry["host"].items() if k.startswith(part)) for part in _OF_A_STEP}
            ns = next(v for k, v in entry["device"].items() if k.startswith("optimizer"))
            found[entry["cell"]["optimizer"]] = OptimizerFit(
                launches=launches,
                host=host_fit(host["optimizer"]),
                zero_grad=host_fit(host["zero_grad"]),
                device_ns=round(float(np.median(ns)), 1),
            )
    return found


_OF_A_STEP = ("optimizer", "zero_grad")
Key = tuple[str, int, int]  # checkpointing, micro-batch, sequence length


class _Device:
    """Medians of the device cells, and what follows from them."""

    def __init__(self, entries: Sequence[Entry], base_length: int) -> None:
        self.base_length = base_length
        found: dict[Key, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for entry in entries:
            if not entry.get("retries"):
                cell = entry["cell"]
                key = cell["checkpointing"], cell["micro_batch"], cell["sequence_length"]
                for part, ns in entry["device"].items():
                    found[key][part] += settled(ns, entry["steps"]) if part.endswith("first") else ns
        self._samples = dict(sorted(found.items()))
        self.accumulate_ns: dict[str, float] = {}
        self.accumulate_ns = {part: self._accumulated(part) for part in ("head_backward", "layers_backward")}
        pairs = [
            (self._ns(key, "layers_backward") - self._ns(plain, "layers_backward")) / self._ns(key, "layers")
            for key in self._samples
            if key[0] == "full" and (plain := ("none", *key[1:])) in self._samples
        ]
        self.recompute = round(max(float(np.median(pairs)), 0.0), 4)

    def curves(self, without: Key | None = None) -> dict[str, Curve]:
        """One a part, through all cells but `without`."""
        return {part: self._curve(part, without) for part in PARTS}

    def residuals(self) -> dict[str, float]:
        """How far a micro-batch is off whose tokens lie between those measured, relative: each cell by the others."""
        found = {}
        cells = [key for key in self._samples if key[0] == "none"]
        tokens = sorted({batch * length for _, batch, length in cells})
        for key in cells:
            _, batch, length = key
            if length == self.base_length and batch * length not in (tokens[0], tokens[-1]):
                curves = self.curves(without=key)
                told = sum(curve.at(batch * length, length) for curve in curves.values())
                found[f"{batch}x{length}"] = round(told / sum(self.part(key, part) for part in PARTS) - 1, 4)
        return found

    def part(self, key: Key, part: str) -> float:
        """Nanoseconds of a part of a step's first micro-batch, without what is computed anew."""
        ns = self._ns(key, part)
        if key[0] == "full" and part == "layers_backward":
            ns -= self.recompute * self._ns(key, "layers")
        return max(ns, 0.0)

    def _ns(self, key: Key, part: str) -> float:
        """The median of a part's times, those of later micro-batches without what adding to gradients takes."""
        samples, more = self._samples[key], self.accumulate_ns.get(part, 0.0)
        later = [ns - more for ns in samples.get(f"{part}/later", ())]
        return float(np.median([*samples[f"{part}/first"], *later]))

    def _accumulated(self, part: str) -> float:
        """What adding to gradients takes: the same whatever the micro-batch, so the small ones tell best."""
        more = [
            float(np.median(samples[f"{part}/later"]) - np.median(samples[f"{part}/first"]))
            for (kind, _, _), samples in sorted(self._samples.items(), key=lambda each: each[0][1] * each[0][2])
            if kind == "none" and f"{part}/later" in samples
        ]
        return round(max(float(np.median(more[:9])), 0.0), 1)

    def _curve(self, part: str, without: Key | None) -> Curve:
        lengths = self._lengths(part)
        bare = Curve(tokens=[0, 1], ns=[0.0, 0.0], **lengths)
        points: dict[int, float] = {}
        # What is measured without checkpointing goes first; other lengths than the base only where nothing else is.
        order = sorted(self._samples, key=lambda key: (key[0] != "none", key[2] != self.base_length))
        for key in order:
            tokens = key[1] * key[2]
            if key != without and tokens not in points:
                points[tokens] = max(self.part(key, part) - tokens * bare.attention_ns(key[2]), 0.0)
        if without is not None:
            points.pop(without[1] * without[2], None)
        return Curve(
            tokens=sorted(points), ns=[round(points[tokens], 1) for tokens in sorted(points)], **lengths
        )  # fmt: skip

    def _lengths(self, part: str) -> dict[str, Any]:
        """What a token costs more in longer sequences, from cells of equally many tokens."""
        cells = [key for key in self._samples if key[0] == "none"]
        by_tokens: dict[int, list[Key]] = defaultdict(list)
        for key in cells:
            by_tokens[key[1] * key[2]].append(key)
        swept = max(by_tokens.values(), key=len)
        if part not in ("layers", "layers_backward") or len(swept) < 2:
            return {}
        tokens = swept[0][1] * swept[0][2]
        swept.sort(key=lambda key: key[2])
        least = self.part(swept[0], part)
        return {
            "sequence_length": [length for _, _, length in swept],
            "token_ns": [round((self.part(key, part) - least) / tokens, 4) for key in swept],
        }


def settled(samples: Sequence[float], steps: int) -> Sequence[float]:
    """Of the first micro-batches of a cell's optimiser steps all but the run's very first: the device is idle as that
    one begins, and waits for the host's first launches and for memory that the allocator has yet to ask for.

    Where only quantiles of many steps are kept, all of them: one in so many does not move their median.
    """
    return samples[1:] if 1 < steps == len(samples) else samples


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
