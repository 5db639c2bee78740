"""One device's share of a tensor-parallel decoder, as Megatron-LM divides it (Shoeybi et al. 2019, section 3).

Query and key-value heads, the MLP's inner columns and the LM head's rows are divided evenly; norms and the embedding
are whole on every device. Two all-reduces a layer, after the attention's and after the MLP's output product, make the
residual stream whole again, and a small one a forward tells all ranks the best token of each share of the vocabulary.
All of it runs on the current stream, so that a CUDA graph captures it as any kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from batchsim.model import ModelShape
from calibration.executor.streams import CudaStreams

if TYPE_CHECKING:
    from calibration.executor.decoder import Layer


# Replaces a tensor by its sum over the ranks, the same bits on each of them. Every rank calls it as often, in the same
# order: `torch.distributed.all_reduce`, NCCL's between GPUs and Gloo's on the CPU.
AllReduce = Callable[[Tensor], object]


class Share:
    """What a decoder computes of a model: all of it."""

    def shape(self, whole: ModelShape) -> ModelShape:
        """The shape of this share of `whole`; `vocab_size` is the embedding's, which is not divided.

        Raises ValueError for a shape that cannot be divided evenly.
        """
        return whole

    def layer(self, whole: Layer, shape: ModelShape) -> Layer:  # noqa: ARG002
        """This share's weights of a layer; `shape` is the share's."""
        return whole

    def head(self, whole: Tensor) -> Tensor:
        """This share's rows of the LM head."""
        return whole

    def reduce(self, branch: Tensor) -> None:
        """Sum the shares' parts of a branch of the residual stream, in place."""

    def choose(self, logits: Tensor, out: Tensor) -> None:
        """`out` (rows) = the tokens with the greatest logits, of which this share has `logits` (rows, its tokens)."""
        torch.argmax(logits, 1, out=out)


WHOLE = Share()


class Shard(Share):
    """Share number `rank` of `size` equal ones, joined by `all_reduce`."""

    def __init__(self, rank: int, size: int, all_reduce: AllReduce) -> None:
        self.rank, self.size, self.all_reduce = rank, size, all_reduce

    def shape(self, whole: ModelShape) -> ModelShape:
        for name in ("num_kv_heads", "num_heads", "intermediate_size", "vocab_size"):
            if (count := getattr(whole, name)) % self.size:
                raise ValueError(f"{name} of {whole.name} is {count}, which {self.size} devices cannot share evenly")
        return whole.shard(self.size)

    def layer(self, whole: Layer, shape: ModelShape) -> Layer:
        heads, kv_heads = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        parts = torch.split(whole.qkv, [self.size * heads, self.size * kv_heads, self.size * kv_heads])
        return whole._replace(
            qkv=torch.cat([self._rows(part) for part in parts]),
            output=self._columns(whole.output),
            gate_up=torch.cat([self._rows(half) for half in whole.gate_up.chunk(2)]),
            down=self._columns(whole.down),
        )

    def head(self, whole: Tensor) -> Tensor:
        return self._rows(whole).clone()

    def reduce(self, branch: Tensor) -> None:
        self.all_reduce(branch)

    def choose(self, logits: Tensor, out: Tensor) -> None:
        values, tokens = logits.max(1)
        # A sum with zeros gathers what each rank says; float64 holds every logit and token exactly.
        every = torch.zeros((self.size, 2, len(logits)), dtype=torch.float64, device=logits.device)
        every[self.rank, 0].copy_(values)
        torch.add(tokens, self.rank * logits.shape[1], out=every[self.rank, 1])
        self.all_reduce(every)
        best = every[:, 0].argmax(0, keepdim=True)
        out.copy_(every[:, 1].gather(0, best)[0])

    def _rows(self, whole: Tensor) -> Tensor:
        return whole.chunk(self.size)[self.rank]

    def _columns(self, whole: Tensor) -> Tensor:
        return whole.chunk(self.size, 1)[self.rank].clone(memory_format=torch.contiguous_format)


class JointStreams(CudaStreams):
    """The streams of one rank, whose runs begin when those of all ranks do."""

    def __init__(
        self, device: torch.device, stamp: Callable[[Tensor], None], timed_copies: int, all_reduce: AllReduce
    ) -> None:
        super().__init__(device, stamp, timed_copies)
        self._all_reduce = all_reduce
        self._token = torch.zeros(1, device=device)

    def begin(self) -> None:
        super().begin()
        self._all_reduce(self._token)
        torch.cuda.synchronize(self._device)
