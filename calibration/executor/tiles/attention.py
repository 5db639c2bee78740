"""Projection to queries, keys and values, causal attention, and the output's projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from batchsim.errors import InputError
from batchsim.tiles.policy import Policy
from batchsim.tiles.shapes import Tiling, attention
from calibration.executor.tiles.attention_kernel import attention_kernel
from calibration.executor.tiles.builds import ALL_BUILDS, one_build
from calibration.executor.tiles.chain import Bound, TileChain, product_operands, random_tensor
from calibration.executor.tiles.plan import Plan


class Attention(TileChain):
    """`out` = attention(`x` `qkv`^T) `output`^T over given tensors, causal over the `rows` tokens of one prompt.

    x, out (rows, hidden); qkv ((heads + 2 kv_heads) head_dim, hidden): queries, then keys, then values, head by head;
    fused (rows, (heads + 2 kv_heads) head_dim) and core (rows, heads head_dim) between the kernels; output (hidden,
    heads head_dim). All of one type, float16 or bfloat16. No positions are rotated in.

    tilings: of the first product, of the attention (see `builds.attention_tiling`), of the second product.
    """

    def __init__(
        self, x: Tensor, qkv: Tensor, output: Tensor, fused: Tensor, core: Tensor, out: Tensor, kv_heads: int,
        head_dim: int, tilings: tuple[Tiling, Tiling, Tiling],
    ) -> None:  # fmt: skip
        rows, hidden = x.shape
        heads = output.shape[1] // head_dim
        first, queries, second = tilings
        if heads % kv_heads:
            raise InputError(None, "kv_heads", str(kv_heads), f"a divisor of {heads} heads")
        if head_dim & (head_dim - 1) or head_dim < 16:
            raise InputError(None, "head_dim", str(head_dim), "a power of two of at least 16")
        if queries.rows % queries.depth:
            raise InputError(None, "tilings", f"{queries.rows} queries", f"a multiple of {queries.depth} keys")
        for depth, tiling, what in ((hidden, first, "hidden"), (heads * head_dim, second, "heads")):
            if tiling.slices > 1 and depth % (tiling.slices * tiling.depth):
                raise InputError(None, what, str(depth), f"a multiple of {tiling.slices * tiling.depth}, to be split")
        self.x, self.qkv, self.output = x, qkv, output
        self.written = (fused, core, out)
        self.heads, self.kv_heads, self.head_dim, self.tilings = heads, kv_heads, head_dim, tilings
        self.chain = attention(rows, hidden, heads, kv_heads, head_dim, *tilings)

    @classmethod
    def random(
        cls, rows: int, hidden: int, heads: int, kv_heads: int, head_dim: int, tilings: tuple[Tiling, Tiling, Tiling],
        *, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, seed: int = 0,
    ) -> Attention:  # fmt: skip
        """Random weights and input, NaN elsewhere."""
        wide, core = (heads + 2 * kv_heads) * head_dim, heads * head_dim

        def drawn(shape: tuple[int, int], scale: float, part: int) -> Tensor:
            return random_tensor(shape, scale, device, dtype, 3 * seed + part)

        def unwritten(cols: int) -> Tensor:
            return torch.full((rows, cols), torch.nan, device=device, dtype=dtype)

        return cls(
            drawn((rows, hidden), 1.0, 0), drawn((wide, hidden), hidden**-0.5, 1), drawn((hidden, core), core**-0.5, 2),
            unwritten(wide), unwritten(core), unwritten(hidden), kv_heads, head_dim, tilings,
        )  # fmt: skip

    def with_tilings(self, tilings: tuple[Tiling, Tiling, Tiling]) -> Attention:
        """The same tensors in other tiles."""
        fused, core, out = self.written
        return Attention(self.x, self.qkv, self.output, fused, core, out, self.kv_heads, self.head_dim, tilings)

    def bind(self, policy: Policy | Plan) -> Bound:
        one, queries, two = self.tilings
        fused, core, out = self.written
        shapes = ALL_BUILDS[one.cost].shape(one.slices), ALL_BUILDS[two.cost].shape(two.slices)
        head = self.head_dim
        operands = (
            *product_operands(self.x, self.qkv, fused, shapes[0]),
            TensorDescriptor.from_tensor(fused, [queries.rows, head]),
            TensorDescriptor.from_tensor(fused, [queries.depth, head]),
            TensorDescriptor.from_tensor(core, [queries.rows, head]),
            *product_operands(core, self.output, out, shapes[1]),
        )
        stages = ALL_BUILDS[queries.cost].stages
        heads = queries.rows, queries.depth, head, stages, self.heads, self.kv_heads
        constants = {"SHAPE0": shapes[0], "HEADS": heads, "SHAPE2": shapes[1]}
        return Bound(attention_kernel, operands, self._plan(policy), constants | one_build(*self.tilings))

    def exact(self) -> Tensor:
        fused = (self.x.double() @ self.qkv.double().T).to(self.x.dtype).double()
        queries, keys, values = (part[0] for part in self._heads(fused))
        share = self.heads // self.kv_heads
        later = torch.ones(len(fused), len(fused), dtype=torch.bool, device=fused.device).triu(1)
        core = torch.empty_like(fused[:, : self.heads * self.head_dim]).view(len(fused), self.heads, self.head_dim)
        for head in range(self.heads):  # one at a time, since scores in float64 are large
            scores = queries[head] @ keys[head // share].T * self.head_dim**-0.5
            core[:, head] = scores.masked_fill(later, -torch.inf).softmax(-1) @ values[head // share]
        return core.flatten(1).to(self.x.dtype).double() @ self.output.double().T

    def library(self) -> Tensor:
        queries, keys, values = self._heads(F.linear(self.x, self.qkv))
        core = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        return F.linear(core[0].transpose(0, 1).flatten(1), self.output)

    def _heads(self, fused: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of the fused tensor, each (1, heads, rows, head_dim)."""
        counts = [self.heads, self.kv_heads, self.kv_heads]
        return torch.split(fused.view(len(fused), -1, self.head_dim).transpose(0, 1)[None], counts, dim=1)
