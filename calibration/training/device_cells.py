"""The device's side of a calibration of training: from the samples of its cells to curves over tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from batchsim.training_profile import PARTS, Curve

Entry = Mapping[str, Any]  # a cell, what it was measured for, and its samples
Key = tuple[str, int, int]  # checkpointing, micro-batch, sequence length


class DeviceCells:
    """Medians of the device's cells of one precision, and what follows from them."""

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
            # Each relative to its own forward pass: the clock may have changed from one cell to the other.
            self._ns(key, "layers_backward") / self._ns(key, "layers")
            - self._ns(plain, "layers_backward") / self._ns(plain, "layers")
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
        """What a token costs more in longer sequences, from cells of equally many tokens.

        A line: a token's share of attention grows with its sequence, and what single cells are off by is the device's
        clock, which changes with the power that it draws.
        """
        by_tokens: dict[int, list[Key]] = defaultdict(list)
        for key in self._samples:
            if key[0] == "none":
                by_tokens[key[1] * key[2]].append(key)
        swept = max(by_tokens.values(), key=len)
        if part not in ("layers", "layers_backward") or len(swept) < 2:
            return {}
        swept.sort(key=lambda key: key[2])
        lengths = [length for _, _, length in swept]
        slope = np.polyfit(lengths, [self.part(key, part) / (key[1] * key[2]) for key in swept], 1)[0]
        token_ns = [round(max(float(slope), 0.0) * (length - lengths[0]), 4) for length in lengths]
        return {"sequence_length": lengths, "token_ns": token_ns}


def settled(samples: Sequence[float], steps: int) -> Sequence[float]:
    """Of the first micro-batches of a cell's optimiser steps all but the run's very first: the device is idle as that
    one begins, and waits for the host's first launches and for memory that the allocator has yet to ask for.

    Where only quantiles of many steps are kept, all of them: one in so many does not move their median.
    """
    return samples[1:] if 1 < steps == len(samples) else samples
