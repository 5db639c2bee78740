"""Chains of dependent kernels timed on a device: in every tiling, under every policy, beside the framework's own."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batchsim.files import write_text
from batchsim.tiles.graph import Chain
from batchsim.tiles.models import DECODERS
from batchsim.tiles.policy import policies
from batchsim.tiles.scenario import AttentionChain, ConvChain, GatedChain, MlpChain, TilesScenario
from batchsim.tiles.shapes import Tiling, attention, conv_pair, gated_mlp, mlp

LIBRARY = "library"
# Beside StreamSync.
POLICIES = ("TileSync", "TileSync/4", "Conv2DTileSync", "StridedSync", "RowSync")
ROUNDS = 7
# A graph holds so many runs that its replay takes about this long, and the device rests before each replay: under
# sustained load the power limit lowers the clocks, by as much as all that ran in the last milliseconds has it.
REPLAY_NS = 1_000_000
REST_S = 0.005
MAX_RUNS = 40

Progress = Callable[[float, str], None]
# Tilings and the policy.
Key = tuple[tuple[Tiling, ...], str]


@dataclass(frozen=True, slots=True)
class Shape:
    """A chain without its tiles.

    sizes: rows, hidden, inner of an MLP; rows, hidden, heads, key-value heads, head dimension of an attention; images,
    height, width, channels, number of convolutions.
    """

    kind: str
    sizes: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.kind} {'x'.join(map(str, self.sizes))}"

    def chain(self, tilings: Sequence[Tiling]) -> Chain:
        build: dict[str, Callable[..., Chain]] = {
            "mlp": mlp, "gated_mlp": gated_mlp, "attention": attention,
        }  # fmt: skip
        if self.kind == "conv":
            images, height, width, channels, convs = self.sizes
            first, second = tilings
            return conv_pair(images, height, width, channels, first, second, convs, self.name)
        return build[self.kind](*self.sizes, *tilings, name=self.name)


def shapes_of(scenario: TilesScenario) -> list[Shape]:
    """The shapes that a scenario names by model, in its order."""
    found = []
    for spec in scenario.chain:
        if isinstance(spec, MlpChain | GatedChain):
            found += [Shape(spec.kind, (m, DECODERS[spec.model].hidden, spec.width)) for m in spec.m]
        elif isinstance(spec, AttentionChain):
            decoder, parallel = DECODERS[spec.model], spec.tensor_parallel
            heads = decoder.heads // parallel, decoder.kv_heads // parallel, decoder.head_dim
            found += [Shape("attention", (m, decoder.hidden, *heads)) for m in spec.m]
        elif isinstance(spec, ConvChain):
            found += [
                Shape("conv", (images, stage.height, stage.width, stage.channels, stage.convs))
                for stage in spec.stages
                for images in spec.images
            ]
    return found


@dataclass(frozen=True, slots=True)
class Timing:
    """Nanoseconds of one chain, of many in a row in one CUDA graph: median and outer tenths over `rounds` replays.

    tilings: of each kernel, empty for the library's. error: of the output against float64, relative.
    """

    kind: str
    sizes: tuple[int, ...]
    tilings: tuple[Tiling, ...]
    policy: str
    ns: float
    low_ns: float
    high_ns: float
    rounds: int
    error: float | None

    @property
    def shape(self) -> Shape:
        return Shape(self.kind, self.sizes)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Timing:
        tilings = tuple(Tiling(*fields) for fields in value["tilings"])
        return cls(**{**value, "sizes": tuple(value["sizes"]), "tilings": tilings})


def measure(
    shapes: Sequence[Shape], out: Path, facts: dict[str, Any], *, deadline_s: float | None = None,
    progress: Progress | None = None, check: bool = False,
) -> list[Timing]:  # fmt: skip
    """Time every shape, and keep what has been measured in `out` after each; shapes that are there are skipped.

    `deadline_s`: no shape is begun so many seconds after the start. `check`: compare outputs with float64's.
    """
    start = time.monotonic()
    timings = read_timings(out) if out.exists() else []
    done = {timing.shape for timing in timings}
    for position, shape in enumerate(shapes):
        if shape in done:
            continue
        if deadline_s is not None and time.monotonic() - start > deadline_s:
            break
        if progress is not None:
            progress(position / len(shapes), shape.name)
        timings += measure_shape(shape, check=check)
        save(out, timings, facts)
    return timings


def measure_shape(shape: Shape, *, check: bool = False) -> list[Timing]:
    """One shape in all tilings, under all policies, interleaved."""
    from calibration.executor.tiles.offers import make_chain, offered

    runs: dict[Key, tuple[Callable[[], object], float | None]] = {}
    checks: list[Callable[[], None]] = []
    first = None
    exact = None
    for tilings in offered(shape.kind, shape.sizes):
        chain = make_chain(shape.kind, shape.sizes, tilings, like=first)
        first = first or chain
        for policy in policies(chain.chain, POLICIES):
            bound = chain.bind(policy)
            chain.poison(1)
            bound.launch()
            bound.check()
            error = None
            if check:
                exact = chain.exact() if exact is None else exact
                error = chain.error(exact)
            runs[tilings, policy.name] = bound.launch, error
            checks.append(bound.check)
    if first is None:
        return []
    first.poison(1)
    runs[(), LIBRARY] = first.library, None
    graphs = {key: _repeated(run) for key, (run, _) in runs.items()}
    samples: dict[Key, list[float]] = {key: [] for key in graphs}
    keys = list(graphs)
    for round_ in range(-1, ROUNDS):
        random.Random(round_).shuffle(keys)
        for key in keys:
            graph, count = graphs[key]
            time.sleep(REST_S)
            before, after = _event(), _event()
            before.record()
            graph.replay()
            after.record()
            torch.cuda.synchronize()
            if round_ >= 0:
                samples[key].append(before.elapsed_time(after) * 1e6 / count)
    for each in checks:
        each()
    return [
        Timing(shape.kind, shape.sizes, key[0], key[1], *_quantiles(samples[key]), ROUNDS, runs[key][1])
        for key in graphs
    ]


def _quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    middle, low, high = np.quantile(samples, (0.5, 0.1, 0.9)).round(1).tolist()
    return middle, low, high


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _repeated(run: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of several runs, one after the other, and how many."""
    from calibration.executor.tiles import captured

    once = captured(run)
    before, after = _event(), _event()
    once.replay()
    before.record()
    once.replay()
    after.record()
    torch.cuda.synchronize()
    count = min(max(round(REPLAY_NS / (before.elapsed_time(after) * 1e6)), 1), MAX_RUNS)

    def runs() -> None:
        for _ in range(count):
            run()

    return captured(runs), count


def save(path: Path, timings: Sequence[Timing], facts: dict[str, Any]) -> None:
    """A line for each timing, below a line of provenance."""
    told = [asdict(timing) | {"tilings": [astuple(tiling) for tiling in timing.tilings]} for timing in timings]
    lines = ",\n ".join(json.dumps(each, separators=(",", ":")) for each in told)
    write_text(path, f'{{"schema_version":1,"provenance":{json.dumps(facts)},\n"timings":[\n {lines}\n]}}\n')


def read_timings(path: Path) -> list[Timing]:
    return [Timing.from_json(value) for value in json.loads(path.read_text(encoding="utf-8"))["timings"]]


def provenance_of(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))["provenance"])
