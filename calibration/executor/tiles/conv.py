"""3x3 convolutions one after the other, as implicit matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from batchsim.errors import InputError
from batchsim.tiles.policy import Policy
from batchsim.tiles.shapes import Tiling, conv_pair
from calibration.executor.tiles.builds import ALL_BUILDS, one_build
from calibration.executor.tiles.chain import Bound, TileChain, random_tensor
from calibration.executor.tiles.conv_kernel import conv_kernel
from calibration.executor.tiles.plan import Plan

CHANNELS = (64, 128, 256, 512)
ROOM = 256  # pixels that room for images is a multiple of, so that no tile reaches into the next


class Conv(TileChain):
    """`convs` convolutions of stride 1 with a border of zeros, each followed by relu, over given tensors.

    stack (convs + 1, room, channels): the input and what each convolution writes, the pixels of all images line by line
    (NHWC), then unused ones up to `room`, a multiple of 256; weights (convs, channels, 3, 3, channels): out, line,
    column, in. Both of one type, float16 or bfloat16.

    tilings: of even and of odd convolutions; rows are pixels, columns channels, the contraction goes tap by tap.
    """

    def __init__(
        self, stack: Tensor, weights: Tensor, images: int, height: int, width: int, tilings: tuple[Tiling, Tiling]
    ) -> None:
        convs, channels = weights.shape[:2]
        pixels = images * height * width
        if stack.shape[1] % ROOM or stack.shape[1] < pixels:
            raise InputError(
                None, "stack", f"room for {stack.shape[1]} pixels", f"a multiple of {ROOM}, {pixels} or more"
            )
        if max(stack[0].numel(), weights.numel()) >= 2**31:
            raise InputError(None, "images", str(images), "fewer than 2^31 values to a tensor")
        for tiling in tilings:
            if channels % tiling.cols or channels % tiling.depth or channels & (channels - 1):
                raise InputError(
                    None, "channels", str(channels), f"a power of two, {max(tiling.cols, tiling.depth)} or more"
                )
            if 9 * channels % (tiling.slices * tiling.depth):
                raise InputError(
                    None, "slices", str(tiling.slices), f"a divisor of {9 * channels // tiling.depth} steps"
                )
        self.stack, self.weights, self.tilings = stack, weights, tilings
        self.images, self.height, self.width = images, height, width
        self.x, *written = (part[:pixels] for part in stack)
        self.written = tuple(written)
        self.chain = conv_pair(images, height, width, channels, *tilings, convs=convs)

    @classmethod
    def random(
        cls, images: int, height: int, width: int, channels: int, convs: int, tilings: tuple[Tiling, Tiling], *,
        device: str = "cuda", dtype: torch.dtype = torch.bfloat16, seed: int = 0,
    ) -> Conv:  # fmt: skip
        """Random weights and input, NaN elsewhere."""
        room = -(-images * height * width // ROOM) * ROOM
        shape = convs, channels, 3, 3, channels
        weights = random_tensor(shape, (2 / (9 * channels)) ** 0.5, device, dtype, 2 * seed)
        stack = torch.full((convs + 1, room, channels), torch.nan, device=device, dtype=dtype)
        chain = cls(stack, weights, images, height, width, tilings)
        chain.poison(2 * seed + 1)
        return chain

    def with_tilings(self, tilings: tuple[Tiling, Tiling]) -> Conv:
        """The same tensors in other tiles."""
        return Conv(self.stack, self.weights, self.images, self.height, self.width, tilings)

    def bind(self, policy: Policy | Plan) -> Bound:
        convs, channels = self.weights.shape[:2]
        room = self.stack.shape[1]
        rows = self.weights.view(convs * channels, 9 * channels)
        flat = self.stack.view(-1, channels)
        descriptors, shapes = [], []
        for tiling in self.tilings:
            descriptors.append(TensorDescriptor.from_tensor(rows, [tiling.cols, tiling.depth]))
            descriptors.append(TensorDescriptor.from_tensor(flat, [tiling.rows, tiling.cols]))
            stages = ALL_BUILDS[tiling.cost].stages
            shapes.append((tiling.rows, tiling.cols, tiling.depth, stages, tiling.slices, channels))
        operands = (flat, *descriptors, self.height, self.width, len(self.x), room)
        constants = {"SHAPE0": shapes[0], "SHAPE1": shapes[1]}
        return Bound(conv_kernel, operands, self._plan(policy), constants | one_build(*self.tilings))

    def exact(self) -> Tensor:
        value = self._nchw(self.x)
        for weight in self.weights:
            value = F.relu(F.conv2d(value.double(), weight.permute(0, 3, 1, 2).double(), padding=1)).to(self.x.dtype)
        return value.permute(0, 2, 3, 1).reshape(self.x.shape).double()

    def library(self) -> Tensor:
        """By the library's convolution that is fastest for the shape, tried in the first call."""
        value = self._nchw(self.x)
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            for weight in self.weights:
                value = F.conv2d(value, weight.permute(0, 3, 1, 2), padding=1).relu_()
        return value.permute(0, 2, 3, 1).reshape(self.x.shape)

    def _nchw(self, pixels: Tensor) -> Tensor:
        """(images, channels, height, width), channels last in memory."""
        return pixels.view(self.images, self.height, self.width, -1).permute(0, 3, 1, 2)
