"""Servers of language models: prompts, drafts that a larger model checks, and sampling outside of the graph."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its customary name

from calibration.pairs.host_work import PIECES, Request
from calibration.pairs.lab import Array, Lab
from calibration.pairs.loop import Annotation, Late, Loop, Pair
from calibration.pairs.models import Decoder, normed
from calibration.pairs.parts import PartDownloads, Parts, Tensors


class Prompts(Parts):
    """Prompts in full, causal; the host looks their blocks of 16 tokens up among the prefixes it knows."""

    def __init__(self, lab: Lab, *, prompts: int, length: int, hidden: int, layers: int) -> None:
        super().__init__(lab)
        self.count, self.length, hidden = lab.size(prompts, 2), lab.size(length, 32), lab.size(hidden, 64)
        self.heads = hidden // 64 if lab.on_gpu else 2
        self.inputs = [((self.count, self.length), torch.int64)]
        self.embedding, self.head = lab.weights(hidden, 8192).T.contiguous(), lab.weights(hidden, 8192)
        self.layers = [
            (lab.weights(hidden, 3 * hidden), lab.weights(hidden, hidden), lab.weights(hidden, 3 * hidden),
             lab.weights(3 * hidden, hidden))
            for _ in range(lab.size(layers, 1))
        ]  # fmt: skip
        half = hidden // self.heads // 2
        angles = torch.outer(torch.arange(self.length), 10000 ** (-torch.arange(half) / half)).to(lab.device)
        self.cosines, self.sines = angles.cos().to(lab.dtype), angles.sin().to(lab.dtype)
        self.known: OrderedDict[int, int] = OrderedDict()

    def prepare(self, step: int, outs: Sequence[Array]) -> None:
        (out,) = outs
        for row in range(self.count):
            seed = (step * 3 + row) % 40
            tokens = ((np.arange(self.length) * (seed + 3) + seed * 31) % 8000).tolist()
            prefix = hits = 0
            for begin in range(0, self.length, 16):
                prefix = hash((prefix, *tokens[begin : begin + 16]))
                if prefix in self.known:
                    self.known.move_to_end(prefix)
                    hits += 1
                else:
                    self.known[prefix] = len(self.known)
                    if len(self.known) > 4096:
                        self.known.popitem(last=False)
            out[row] = tokens
            out[row, -1] = hits

    def forward(self, *inputs: torch.Tensor) -> Tensors:
        x = normed(self.embedding[inputs[0]])
        for inward, outward, up, down in self.layers:
            query, key, value = (x @ inward).view(self.count, self.length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(self._turned(query), self._turned(key), value, is_causal=True)
            x = normed(x + attended.transpose(1, 2).reshape(x.shape) @ outward)
            x = normed(x + F.silu(x @ up) @ down)
        best = (x[:, -1] @ self.head).float().log_softmax(-1).max(-1)
        return best.indices, best.values

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        """Rotary positions: (..., length, head size)."""
        left, right = x.chunk(2, -1)
        return torch.cat([left * self.cosines - right * self.sines, right * self.cosines + left * self.sines], -1)

    def use(self, *results: Any) -> Any:
        tokens, chances = results
        return "".join(PIECES[token % 1024] for token in tokens), chances


class Drafts:
    """A small model drafts tokens, a large one checks them, each in a graph; what they know stays on the device."""

    AHEAD = 3

    def __init__(self, lab: Lab, *, batch: int, hidden: int, layers: int, context: int, care: int) -> None:
        hidden, layers, context = lab.size(hidden, 64), lab.size(layers, 1), lab.size(context, 8)
        vocabulary = lab.size(16000, 128)
        self.small = Decoder(lab, batch, hidden=lab.size(512, 32), layers=2, vocabulary=vocabulary, context=context)
        self.large = Decoder(
            lab, batch * (self.AHEAD + 1), hidden=hidden, layers=layers, vocabulary=vocabulary, context=context
        )
        self.requests = [Request(index, last=index + 1, length=1) for index in range(batch)]
        self.care = care
        self.last, self.lengths = (lab.zeros(batch, dtype=torch.int64) for _ in range(2))
        self.offered, self.picked = (lab.zeros(batch, self.AHEAD + 1, dtype=torch.int64) for _ in range(2))
        self.ahead = torch.arange(self.AHEAD + 1, device=lab.device)
        self.draft, self.check = lab.capture(self._draft), lab.capture(self._check)
        self.last.copy_(torch.arange(1, batch + 1))
        self.lengths.fill_(1)

    def _draft(self) -> None:
        token = self.last
        self.offered[:, 0] = token
        for i in range(self.AHEAD):
            token = self.small(token, self.lengths + i)
            self.offered[:, i + 1] = token

    def _check(self) -> None:
        positions = self.lengths[:, None] + self.ahead
        self.picked.copy_(self.large(self.offered.flatten(), positions.flatten()).view(self.picked.shape))

    def run(self) -> Tensors:
        """A step of both models: the tokens that the large one picked (batch, 4), and how many of them hold (batch,).

        The models are random and never agree, so a coin stands for it: the last bit of both tokens.
        """
        self.draft()
        self.check()
        agreed = (self.picked[:, :-1] + self.offered[:, 1:]) % 2 == 0
        return self.picked, agreed.long().cumprod(1).sum(1) + 1

    def advance(self, counts: torch.Tensor) -> None:
        """Go on behind the tokens that hold, on the device."""
        self.last.copy_(self.picked.gather(1, counts[:, None] - 1)[:, 0])
        self.lengths += counts

    def take(self, picked: list[list[int]], counts: list[int]) -> int:
        total = 0
        for request, tokens, count in zip(self.requests, picked, counts, strict=True):
            for token in tokens[:count]:
                request.length += 1
                total += request.take(token, self.care)
        return total


class SyncDrafts(Loop):
    """Reads the tokens, counts those that hold on the host, and sends the last ones and the lengths."""

    def __init__(self, lab: Lab, drafts: Drafts) -> None:
        super().__init__(lab)
        self.drafts = drafts

    def step(self, _: int) -> None:
        drafts = self.drafts
        with self.phase("inputs"):
            drafts.last.copy_(torch.tensor([request.last for request in drafts.requests]))
            drafts.lengths.copy_(torch.tensor([request.length for request in drafts.requests]))
        with self.phase("models"):
            picked, counts = drafts.run()
        with self.phase("results"):
            results = picked.tolist(), counts.tolist()
        with self.phase("update"):
            self.outputs.append(drafts.take(*results))


class LateDrafts(Late):
    """Goes on from the device's own tokens and reads them a step late."""

    def __init__(self, lab: Lab, drafts: Drafts) -> None:
        super().__init__(lab)
        self.drafts, self.downloads = drafts, PartDownloads(lab)

    def launch(self, step: int) -> None:
        with self.phase("models"):
            picked, counts = self.drafts.run()
            self.downloads.send(step, (picked, counts))
            self.drafts.advance(counts)

    def read(self, step: int) -> None:
        with self.phase("results"):
            picked, counts = (values.tolist() for values in self.downloads.read(step))
        with self.phase("update"):
            self.outputs.append(self.drafts.take(picked, counts))


class Sampler:
    """A model with a state for each request in a graph, and sampling in eager operations behind it."""

    def __init__(self, lab: Lab, *, batch: int, heads: int, layers: int, care: int) -> None:
        size, heads, vocabulary = lab.size(128, 8), lab.size(heads, 2), lab.size(32000, 128)
        self.split, self.care, layers = (batch * heads, 1, size), care, lab.size(layers, 1)
        hidden = heads * size
        self.embedding, self.head = lab.weights(hidden, vocabulary).T.contiguous(), lab.weights(hidden, vocabulary)
        self.layers = [
            (lab.weights(hidden, 3 * hidden), lab.weights(hidden, hidden), lab.zeros(batch * heads, size, size))
            for _ in range(layers)
        ]
        self.noise = torch.rand(16, batch, 64, generator=torch.Generator().manual_seed(1)).to(lab.device)
        self.tokens, self.logits = lab.zeros(batch, dtype=torch.int64), lab.zeros(batch, vocabulary)
        self.requests = [Request(index, last=index, length=1) for index in range(batch)]
        self.replay: Callable[[], None] = lab.capture(self._trunk)
        for _, _, state in self.layers:
            state.zero_()
        self.tokens.copy_(torch.arange(batch))

    def _trunk(self) -> None:
        x = normed(self.embedding[self.tokens])
        for inward, outward, state in self.layers:
            query, key, value = (part.reshape(self.split) for part in (x @ inward).chunk(3, -1))
            state.baddbmm_(key.transpose(1, 2), value, beta=0.9, alpha=0.1)
            x = normed(x + torch.bmm(query, state).reshape(x.shape) @ outward)
        self.logits.copy_(x @ self.head)

    def run(self, step: int) -> Tensors:
        """The next tokens and their log-probabilities, (batch,) each."""
        self.replay()
        best = (self.logits.float() / 0.8).topk(64)
        chances = best.values.log_softmax(-1)
        place = (chances.exp() / -self.noise[step % 16].clamp(min=1e-6).log()).argmax(-1, keepdim=True)
        return best.indices.gather(1, place)[:, 0], chances.gather(1, place)[:, 0]

    def take(self, tokens: list[int], chances: list[float]) -> Any:
        for request in self.requests:
            request.length += 1
        taken = [request.take(token, self.care) for request, token in zip(self.requests, tokens, strict=True)]
        return sum(taken), float(sum(chances))


class SyncSampler(Loop):
    """Reads tokens, then their probabilities, and sends the tokens back."""

    def __init__(self, lab: Lab, sampler: Sampler) -> None:
        super().__init__(lab)
        self.sampler = sampler

    def step(self, step: int) -> None:
        sampler = self.sampler
        with self.phase("inputs"):
            sampler.tokens.copy_(torch.tensor([request.last for request in sampler.requests]))
        with self.phase("model"):
            tokens, chances = sampler.run(step)
        with self.phase("results"):
            results = tokens.tolist(), chances.tolist()
        with self.phase("update"):
            self.outputs.append(sampler.take(*results))


class LateSampler(Late):
    """Feeds tokens back on the device and reads them a step late."""

    def __init__(self, lab: Lab, sampler: Sampler) -> None:
        super().__init__(lab)
        self.sampler, self.downloads = sampler, PartDownloads(lab)

    def launch(self, step: int) -> None:
        with self.phase("model"):
            tokens, chances = self.sampler.run(step)
            self.sampler.tokens.copy_(tokens)
        with self.phase("to_host"):
            self.downloads.send(step, (tokens, chances))

    def read(self, step: int) -> None:
        with self.phase("results"):
            tokens, chances = (values.tolist() for values in self.downloads.read(step))
        with self.phase("update"):
            self.outputs.append(self.sampler.take(tokens, chances))


def drafting(name: str, description: str, annotation: Annotation, **shape: int) -> Pair:
    return Pair(name, description, "gains", lambda lab: SyncDrafts(lab, Drafts(lab, **shape)),
                lambda lab: LateDrafts(lab, Drafts(lab, **shape)), annotation)  # fmt: skip


def sampling(name: str, description: str, annotation: Annotation, **shape: int) -> Pair:
    return Pair(name, description, "gains", lambda lab: SyncSampler(lab, Sampler(lab, **shape)),
                lambda lab: LateSampler(lab, Sampler(lab, **shape)), annotation)  # fmt: skip
