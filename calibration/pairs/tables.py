"""Tables and keys: look-ups, graphs, sorting, groups; text that is parsed as JSON or by regular expressions."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its customary name

from calibration.pairs.lab import Array, Lab, digest
from calibration.pairs.loop import Stages
from calibration.pairs.parts import Parts, Tensors

WORD = re.compile(r"[a-z]+(?:_\d+)?")
LIMIT = re.compile(r"limit\[(\d+)\]\s*=\s*(-?\d+)(?:k|M)?;")


class Events(Parts):
    """Events as lines of JSON, their words found by a regular expression; the best of millions of items for each."""

    WORDS = 24

    def __init__(self, lab: Lab, *, events: int, items: int) -> None:
        super().__init__(lab)
        self.events, self.rows, self.items = lab.size(events, 4), lab.size(1_000_000, 500), lab.size(items, 300)
        self.inputs = [((self.events, self.WORDS), torch.int64), ((self.events * 8,), torch.int64)]
        self.lines = [
            json.dumps({
                "id": i, "user": {"name": f"user_{i * 37 % 911}", "tags": [f"t{i * j % 53}" for j in range(5)]},
                "message": " ".join(f"word_{(i * 7 + j * j) % 1999}" for j in range(self.WORDS)),
                "seen": [(i * 31 + j * 101) % self.items for j in range(8)],
            }) for i in range(512)
        ]  # fmt: skip
        self.table, self.targets = lab.weights(self.rows, 128), lab.weights(self.items, 128) * 10
        self.popular = lab.zeros(self.items, dtype=torch.int64)

    def prepare(self, step: int, outs: Sequence[Array]) -> None:
        words, seen = outs
        for row in range(self.events):
            event = json.loads(self.lines[(step * 17 + row) % len(self.lines)])
            base = sum(map(ord, event["user"]["name"])) * 7919
            found = [base + int(word.rpartition("_")[2]) * 104729 for word in WORD.findall(event["message"])]
            words[row] = [value % self.rows for value in found[: self.WORDS]]
            seen[row * 8 : row * 8 + 8] = event["seen"]

    def forward(self, *inputs: torch.Tensor) -> Tensors:
        words, seen = inputs
        self.popular.scatter_add_(0, seen, torch.ones_like(seen))
        users = F.embedding_bag(words, self.table, mode="sum")
        best = ((users @ self.targets.T).softmax(-1) * 100).topk(min(50, self.items), -1)
        return best.values.float(), best.indices, self.popular[seen]

    def use(self, *results: Any) -> Any:
        values, indices, counts = results
        answers = [{"items": row[:10], "shard": row[0] % 16} for row in indices.tolist()]
        return len(json.dumps(answers)), digest(values), int(counts.sum())


class Towers(Parts):
    """Three towers on three streams; numpy draws negatives by popularity."""

    def __init__(self, lab: Lab, *, rows: int, width: int, layers: int) -> None:
        super().__init__(lab)
        self.rows, width, self.layers = lab.size(rows, 4), lab.size(width, 16), lab.size(layers, 1)
        self.known = lab.size(400_000, 200)
        self.inputs = [((self.rows, length), torch.int64) for length in (20, 16, 4)]
        self.tables = [lab.weights(self.known, width) for _ in self.inputs]
        self.cumulated = np.cumsum(1 / np.arange(1, min(self.known, 50_000) + 1))
        self.places = np.arange(self.rows)[:, None] * 7919
        self.streams = [lab.stream() for _ in range(2)]
        self.forked, self.joined = lab.event(), [lab.event() for _ in self.streams]

    def prepare(self, step: int, outs: Sequence[Array]) -> None:
        for out, stride in zip(outs[:2], (104729, 1299709), strict=True):
            np.remainder(self.places + np.arange(out.shape[1]) * stride + step * 131, self.known, out=out)
        drawn = np.random.default_rng(step).random(outs[2].shape) * self.cumulated[-1]
        outs[2][:] = np.searchsorted(self.cumulated, drawn)

    def forward(self, *inputs: torch.Tensor) -> Tensors:
        self.forked.record()
        found = []
        for table, ids, stream, joined in zip(self.tables[1:], inputs[1:], self.streams, self.joined, strict=True):
            with self.lab.on(stream):
                self.forked.wait()
                found.append(self._tower(table, ids))
                joined.record()
        mine = self._tower(self.tables[0], inputs[0])
        for joined in self.joined:
            joined.wait()
        return ((mine * (found[0] - found[1])).sum(-1).float(),)

    def _tower(self, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        x = F.embedding(ids, table) * 100
        for _ in range(self.layers):
            x = F.layer_norm(F.silu(x) * x.softmax(1) + x, x.shape[-1:])
        return x.mean(1)

    def use(self, *results: Any) -> Any:
        (scores,) = results
        return digest(np.sort(scores)), float(np.quantile(scores, 0.9))


class Neighbours(Stages):
    """A graph network: gathers along edges and adds up at nodes. Dictionaries and sets of Python choose the nodes."""

    dtype = torch.int64

    def __init__(self, lab: Lab, *, nodes: int, edges: int, layers: int, seeds: int) -> None:
        super().__init__(lab)
        self.nodes, edges, self.layers = lab.size(nodes, 50), lab.size(edges, 300), lab.size(layers, 2)
        self.shape = (lab.size(seeds, 8),)
        draw = np.random.default_rng(8)
        self.starts, self.ends = (
            torch.from_numpy(draw.integers(0, self.nodes, edges)).to(lab.device) for _ in range(2)
        )  # fmt: skip
        self.features = lab.weights(self.nodes, 64).float() * 100
        self.adjacent = {i: [(i * 31 + j * 17) % self.nodes for j in range(6)] for i in range(4096)}

    def prepare(self, step: int, out: Array) -> None:
        chosen: dict[int, int] = {}
        fresh = itertools.count(step * 13)
        frontier = [step % 4096, step * 7 % 4096]
        while len(chosen) < len(out):
            ahead: set[int] = set()
            for node in frontier:
                chosen.setdefault(node, len(chosen))
                ahead.update(self.adjacent.get(node % 4096, ()))
            frontier = sorted(ahead - chosen.keys()) or [self.nodes + next(fresh)]
        out[:] = [node % self.nodes for node in list(chosen)[: len(out)]]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        x = self.features.clone()
        x[inputs] += 1
        for _ in range(self.layers):
            x = torch.tanh(torch.zeros_like(x).index_add_(0, self.ends, x[self.starts]) * 0.1 + x)
        return x[inputs].square().sum(1)

    def use(self, result: Array) -> Any:
        best: dict[int, float] = {}
        for i, value in enumerate(result.tolist()):
            best[i % 37] = max(best.get(i % 37, 0.0), value)
        return digest(result), sum(best.values())


class Sorting(Stages):
    """Millions of keys sorted and counted between limits, which a regular expression finds in a text."""

    dtype = torch.int64

    def __init__(self, lab: Lab, *, keys: int, limits: int) -> None:
        super().__init__(lab)
        self.keys, self.shape = lab.size(keys, 64), (lab.size(limits, 8),)
        base = np.random.default_rng(9).integers(0, 1 << 30, self.keys)
        self.base = torch.from_numpy(base).to(lab.device)
        self.texts = [
            "".join(
                f"limit[{i}] = {((i + j) * 104395301 + j) % (1 << 30)};  # note {i}\n" for i in range(self.shape[0])
            )
            for j in range(16)
        ]

    def prepare(self, step: int, out: Array) -> None:
        for index, value in LIMIT.findall(self.texts[step % 16]):
            out[int(index)] = int(value)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        ordered = ((self.base + inputs[0]) % (1 << 30)).sort().values
        places = torch.searchsorted(ordered, inputs.sort().values)
        return torch.stack([places, ordered[places.clamp(max=self.keys - 1)] - ordered.cumsum(0)[0]])

    def use(self, result: Array) -> Any:
        return int(result[0].sum()), int(result[1].max())


class Groups(Stages):
    """Features of many small groups, one by one: Python's book-keeping and a few small kernels for each."""

    dtype = torch.float32

    def __init__(self, lab: Lab, *, groups: int) -> None:
        super().__init__(lab)
        self.groups, self.shape = lab.size(groups, 3), (4096,)
        self.values = np.random.default_rng(10).random(4096 + 64, dtype=np.float32)
        self.sizes: dict[str, int] = {}

    def prepare(self, step: int, out: Array) -> None:
        out[:] = self.values[step % 64 :][:4096]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found = []
        for group in range(self.groups):
            names = [f"group_{group}.part_{part}" for part in range(40)]
            for name in names:
                self.sizes[name] = self.sizes.get(name, 0) + len(name)
            begin = sum(self.sizes[name] for name in names) % 2048
            part = inputs[begin : begin + 512]
            found.append(torch.stack([part.mean(), part.amax()]))
        return torch.cat(found)

    def use(self, result: Array) -> Any:
        return digest(result)
