"""What a calibration has measured so far, kept on disk so that an interrupted one loses nothing."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Protocol, TypeVar

import numpy as np

from batchsim.errors import RunError
from batchsim.files import write_text
from calibration.cells import Samples

# Host times of a run do not count when these calls took so many times as long as they do in such runs.
FIXED_PHASES = ("copy_in", "copy_out", "record")
DISTURBED = 1.4


def of_any_batch(key: str) -> str:
    """A cell's key without its batch."""
    return key.rsplit("/", 2)[0]


class Keyed(Protocol):
    """A cell, or whatever else a run is of; the key's last two parts name the batch, those before them the kind."""

    @property
    def key(self) -> str: ...


AnyKeyed = TypeVar("AnyKeyed", bound=Keyed)


class Store:
    """Runs measured so far (a cell's key and its samples), saved now and then.

    With `resume`, those that `path` holds; raises RunError if they are not of `identity`. `kind` of a key names the
    runs in which FIXED_PHASES take equally long as long as nothing disturbs the host.
    """

    SAVE_EVERY_S = 10.0

    def __init__(
        self, path: Path, identity: dict[str, Any], *, resume: bool, kind: Callable[[str], str] = of_any_batch
    ) -> None:
        self.path = path
        self.identity = identity
        self.kind = kind
        self.runs: list[tuple[str, Samples]] = []
        self._saved_s = time.monotonic()
        if resume and path.exists():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                found, self.runs = content["identity"], [(key, samples) for key, samples in content["runs"]]
            except (ValueError, KeyError, TypeError):
                raise RunError(f"{path}: is no interrupted calibration; remove it to start anew") from None
            if found != identity:
                raise RunError(f"{path}: was measured for {found}, not {identity}; remove it to start anew")

    def pending(self, cells: Sequence[AnyKeyed], rounds: int) -> Iterator[tuple[float, AnyKeyed]]:
        """(fraction done, cell) for every run still to do; each round visits all cells in an order of its own."""
        done = Counter(key for key, _ in self.runs)
        for round_ in range(rounds):
            order = sorted(cells, key=lambda cell: cell.key)
            random.Random(round_).shuffle(order)
            for i, cell in enumerate(order):
                if done[cell.key] <= round_:
                    yield (round_ + i / len(order)) / rounds, cell

    def add(self, cell: Keyed, samples: Samples) -> None:
        """Keep what a run of `cell` told."""
        self.runs.append((cell.key, samples))
        if time.monotonic() - self._saved_s > self.SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Write all runs, whole."""
        write_text(self.path, json.dumps({"identity": self.identity, "runs": self.runs}, separators=(",", ":")))
        self._saved_s = time.monotonic()

    def disturbed(self) -> list[bool]:
        """For each run, whether the host was disturbed: whether its batch-independent calls took clearly longer than
        in the quietest tenth of the runs of its kind."""
        took = [sum(median(samples.get(phase, [0])) for phase in FIXED_PHASES) for _, samples in self.runs]
        by_kind: dict[str, list[float]] = {}
        for (key, _), ns in zip(self.runs, took, strict=True):
            by_kind.setdefault(self.kind(key), []).append(ns)
        quiet = {kind: float(np.quantile(found, 0.1)) for kind, found in by_kind.items()}
        return [ns > DISTURBED * quiet[self.kind(key)] for (key, _), ns in zip(self.runs, took, strict=True)]

    def measured(self, cells: Iterable[AnyKeyed]) -> dict[AnyKeyed, Samples]:
        """All samples of each cell, without the host's times in disturbed runs."""
        by_key: dict[str, Samples] = {}
        for (key, samples), disturbed in zip(self.runs, self.disturbed(), strict=True):
            merged = by_key.setdefault(key, {})
            for stage, values in samples.items():
                if not disturbed or stage in _of_the_device(key):
                    merged.setdefault(stage, []).extend(values)
        return {cell: by_key[cell.key] for cell in cells if cell.key in by_key}


def _of_the_device(key: str) -> tuple[str, ...]:
    """The samples of a cell's runs that tell of the device whatever the host does."""
    if "/prefill/" in key:  # the launches of prompts tell whether they or the device set the pace
        return ("decode", "prefill", "gap", "launch")
    if "/eager/" in key:  # as long as the host makes it
        return ()
    return ("decode", "forward", "gap")
