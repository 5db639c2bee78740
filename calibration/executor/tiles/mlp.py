"""Two dependent matrix products: an MLP with an activation between them, plain or gated."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from batchsim.errors import InputError
from batchsim.tiles.policy import Policy
from batchsim.tiles.shapes import Tiling, gated_mlp, mlp
from calibration.executor.tiles.builds import one_build
from calibration.executor.tiles.chain import Bound, TileChain, product_operands, random_tensor
from calibration.executor.tiles.pair import pair_kernel
from calibration.executor.tiles.plan import Plan
from calibration.executor.tiles.tilings import BUILDS

Activation = Literal["none", "relu", "gelu"]


class Mlp(TileChain):
    """`out` = activation(`x` `first`^T) `second`^T over given tensors, `middle` between the products.

    x, out (rows, hidden); first (inner, hidden), or (2 * inner, hidden) when gated: gate, then up, and the activation
    is silu(gate) * up; middle (rows, inner); second (hidden, inner). All of one type, float16 or bfloat16. A third
    tiling is that of the second product's tail.
    """

    def __init__(
        self, x: Tensor, first: Tensor, second: Tensor, middle: Tensor, out: Tensor, tilings: tuple[Tiling, ...],
        *, gated: bool = False, activation: Activation = "gelu",
    ) -> None:  # fmt: skip
        (rows, hidden), inner = x.shape, second.shape[1]
        for depth, tiling, what in zip((hidden, inner, inner), tilings, ("hidden", "inner", "inner"), strict=False):
            if tiling.slices > 1 and depth % (tiling.slices * tiling.depth):
                raise InputError(None, what, str(depth), f"a multiple of {tiling.slices * tiling.depth}, to be split")
        if [BUILDS[tiling.cost].gated for tiling in tilings] != [gated, *(False for _ in tilings[1:])]:
            raise InputError(None, "tilings", " and ".join(tiling.cost for tiling in tilings), "ones for this MLP")
        self.x, self.first, self.second = x, first, second
        self.written = (middle, out)
        self.tilings, self.gated = tilings, gated
        self.activation: Activation = "none" if gated else activation
        self.chain = (gated_mlp if gated else mlp)(rows, hidden, inner, *tilings)

    @classmethod
    def random(
        cls, rows: int, hidden: int, inner: int, tilings: tuple[Tiling, ...], *, gated: bool = False,
        activation: Activation = "gelu", device: str = "cuda", dtype: torch.dtype = torch.bfloat16, seed: int = 0,
    ) -> Mlp:  # fmt: skip
        """Random weights and input, NaN elsewhere."""

        def drawn(shape: tuple[int, int], scale: float, part: int) -> Tensor:
            return random_tensor(shape, scale, device, dtype, 3 * seed + part)

        return cls(
            drawn((rows, hidden), 1.0, 0),
            drawn((2 * inner if gated else inner, hidden), hidden**-0.5, 1),
            drawn((hidden, inner), inner**-0.5, 2),
            torch.full((rows, inner), torch.nan, device=device, dtype=dtype),
            torch.full((rows, hidden), torch.nan, device=device, dtype=dtype),
            tilings, gated=gated, activation=activation,
        )  # fmt: skip

    def bind(self, policy: Policy | Plan) -> Bound:
        middle, out = self.written
        # Without a tail the second product stands in its place.
        one, two, tail = (*self.tilings, self.tilings[1])[:3]
        shapes = [BUILDS[tiling.cost].shape(tiling.slices) for tiling in (one, two, tail)]
        main = self.chain.kernels[1].cols
        from_col = main if len(self.tilings) > 2 else 0
        operands = (
            *product_operands(self.x, self.first, middle, shapes[0], gated=self.gated),
            *product_operands(middle, self.second[:main], out[:, :main], shapes[1]),
            *product_operands(middle, self.second[from_col:], out[:, from_col:], shapes[2]),
        )
        constants = {
            "GATED": self.gated, "ACTIVATION": self.activation,
            "SHAPE0": shapes[0], "SHAPE1": shapes[1], "SHAPE2": shapes[2], "TAIL": len(self.tilings) > 2,
        }  # fmt: skip
        return Bound(pair_kernel, operands, self._plan(policy), constants | one_build(*self.tilings))

    def exact(self) -> Tensor:
        hidden = _activated(self.x.double() @ self.first.double().T, self.gated, self.activation)
        return hidden.to(self.x.dtype).double() @ self.second.double().T

    def library(self) -> Tensor:
        if self.gated and self.x.is_cuda:
            from calibration.executor.kernels import swiglu  # one pass over both halves, as our decoder has it

            inner = torch.empty_like(self.written[0])
            swiglu(F.linear(self.x, self.first), inner)
            return F.linear(inner, self.second)
        return F.linear(_activated(F.linear(self.x, self.first), self.gated, self.activation), self.second)


class TileMlp:
    """Gated MLPs of one number of rows, run under one policy over whatever tensors they are called with.

    Call it as `mlp(x, gate_up, down, middle, out)`; shapes are those of `Mlp`. What belongs to the tensors is made at
    the first call with them, which compiles too, and belongs before a capture.
    """

    def __init__(self, policy: Policy, tilings: tuple[Tiling, ...], device: str = "cuda") -> None:
        self.plan, self.tilings = Plan(policy, device), tilings
        self._bound: dict[tuple[int, ...], Bound] = {}

    def __call__(self, x: Tensor, gate_up: Tensor, down: Tensor, middle: Tensor, out: Tensor) -> None:
        key = x.data_ptr(), gate_up.data_ptr(), down.data_ptr(), middle.data_ptr(), out.data_ptr()
        bound = self._bound.get(key)
        if bound is None:
            bound = self._bound[key] = Mlp(x, gate_up, down, middle, out, self.tilings, gated=True).bind(self.plan)
        bound.launch()

    def check(self) -> None:
        """Raise RunError if a tile has waited too long since the last check."""
        self.plan.check()


def _activated(x: Tensor, gated: bool, activation: Activation) -> Tensor:
    if gated:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    if activation == "gelu":
        return F.gelu(x, approximate="tanh")
    return F.relu(x) if activation == "relu" else x
