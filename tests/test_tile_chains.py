"""Attention and convolutions in Triton's interpreter: every policy against float64, odd sizes included.

Run by `TRITON_INTERPRET=1 pytest tests/test_tile_chains.py` where Triton is installed; no GPU is needed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from batchsim.errors import InputError
from batchsim.tiles.policy import Policy, policies
from tests.tile_chains import worst_error

if TYPE_CHECKING:
    from calibration.executor.tiles.attention import Attention
    from calibration.executor.tiles.conv import Conv

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
pytestmark = [
    pytest.mark.skipif(not INTERPRETER, reason="needs TRITON_INTERPRET=1 and Triton"),
    pytest.mark.filterwarnings("default"),  # Triton's are not this project's
]
POLLS = 50
TOLERANCE = 1e-3  # float16, since the interpreter multiplies bfloat16 matrices as integers


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that small shapes have several of."""
    from calibration.executor.tiles import BUILDS, Build
    from calibration.executor.tiles.builds import ATTENTION_BUILDS, CONV_BUILDS

    for build in (Build(16, 32, 16, warps=4, stages=3), Build(16, 48, 16, warps=4, stages=3)):
        monkeypatch.setitem(BUILDS, f"{build.rows}x{build.cols}", build)
    for build in (Build(32, 16, 16, warps=4, stages=2), Build(32, 16, 32, warps=4, stages=2)):
        monkeypatch.setitem(ATTENTION_BUILDS, f"attention {build.rows}x{build.depth}", build)
    for build in (Build(16, 16, 16, warps=4, stages=2), Build(32, 16, 16, warps=4, stages=2)):
        monkeypatch.setitem(CONV_BUILDS, f"conv {build.rows}x{build.cols}", build)


def attention(rows: int, queries: str = "32x16", slices: int = 1, kv_heads: int = 2) -> Attention:
    from calibration.executor.tiles import tiling
    from calibration.executor.tiles.attention import Attention
    from calibration.executor.tiles.builds import attention_tiling

    tilings = tiling("16x48", slices), attention_tiling(f"attention {queries}", 16), tiling("16x32", slices)
    return Attention.random(rows, 64, 4, kv_heads, 16, tilings, device="cpu", dtype=torch.float16)


def conv(images: int, height: int, width: int, channels: int, convs: int = 2, slices: int = 1) -> Conv:
    from calibration.executor.tiles.builds import conv_tiling
    from calibration.executor.tiles.conv import Conv

    tilings = conv_tiling("conv 16x16", slices), conv_tiling("conv 32x16", slices)
    return Conv.random(images, height, width, channels, convs, tilings, device="cpu", dtype=torch.float16)


@pytest.mark.parametrize(("rows", "queries", "slices", "kv_heads"), [
    (1, "32x16", 1, 2), (40, "32x32", 1, 4), (50, "32x16", 2, 1), (64, "32x16", 1, 2),
])  # fmt: skip
def test_every_policy_computes_attention(rows: int, queries: str, slices: int, kv_heads: int) -> None:
    chain = attention(rows, queries, slices, kv_heads)
    for policy in policies(chain.chain):
        assert worst_error(chain, policy, range(2), limit=POLLS) < TOLERANCE, policy.name


@pytest.mark.parametrize(("images", "height", "width", "channels", "convs", "slices"), [
    (1, 1, 1, 16, 2, 1), (2, 5, 7, 16, 2, 1), (3, 6, 4, 16, 2, 3), (1, 9, 3, 32, 4, 1),
])  # fmt: skip
def test_every_policy_computes_convolutions(
    images: int, height: int, width: int, channels: int, convs: int, slices: int
) -> None:
    chain = conv(images, height, width, channels, convs, slices)
    for policy in policies(chain.chain):
        assert worst_error(chain, policy, range(2), limit=POLLS) < TOLERANCE, policy.name


def test_the_library_computes_the_same() -> None:
    for chain in (attention(40), conv(2, 5, 7, 16)):
        chain.poison(1)
        chain.out.copy_(chain.library())
        for middle in chain.written[:-1]:
            assert middle.isnan().all()
        assert chain.error() < TOLERANCE


def last_first(policy: Policy) -> Policy:
    """The last tile of the chain taken first, and waiting for nothing."""
    waits_from = policy.waits_from.copy()
    waits_from[-1] = waits_from[-2]
    return dataclasses.replace(policy, order=np.roll(policy.order, 1), waits_from=waits_from)


def test_a_dropped_dependence_gives_wrong_numbers() -> None:
    for chain in (attention(40), conv(2, 5, 7, 16)):
        for policy in policies(chain.chain)[1:]:
            assert not worst_error(chain, last_first(policy), range(1), limit=POLLS) < TOLERANCE, policy.name


def test_chains_in_other_tiles_share_their_tensors() -> None:
    from calibration.executor.tiles.builds import conv_tiling
    from calibration.executor.tiles.offers import make_chain

    chain = conv(2, 5, 7, 16)
    other = make_chain("conv", (2, 5, 7, 16, 2), (conv_tiling("conv 32x16"),) * 2, chain)
    assert other.x.data_ptr() == chain.x.data_ptr() and other.out.data_ptr() == chain.out.data_ptr()
    assert worst_error(other, policies(other.chain)[-1], range(1), limit=POLLS) < TOLERANCE


@pytest.mark.parametrize(("kind", "sizes"), [
    ("mlp", (16, 4096, 14336)), ("mlp", (300, 12288, 6144)), ("mlp", (2048, 12288, 6144)),
    ("gated_mlp", (16, 4096, 14336)), ("gated_mlp", (512, 4096, 14336)), ("gated_mlp", (2000, 2048, 8192)),
    ("attention", (37, 4096, 32, 8, 128)), ("attention", (512, 2048, 32, 8, 64)),
    ("attention", (3000, 4096, 32, 8, 128)),
    ("conv", (1, 7, 7, 512, 2)), ("conv", (8, 14, 14, 256, 4)), ("conv", (32, 56, 56, 64, 2)),
])  # fmt: skip
def test_offers_are_distinct_and_have_proven_policies(kind: str, sizes: tuple[int, ...]) -> None:
    from batchsim.tiles import shapes
    from calibration.executor.tiles.builds import one_build
    from calibration.executor.tiles.offers import offered

    offers = offered(kind, sizes)
    assert offers and len(set(offers)) == len(offers)
    for tilings in offers:
        assert one_build(*tilings)["num_warps"] in (4, 8)
        build: Any = getattr(shapes, "conv_pair" if kind == "conv" else kind)
        graph = build(*sizes[:4], *tilings, *sizes[4:]) if kind == "conv" else build(*sizes, *tilings)
        assert len(policies(graph, only=("RowSync",))) >= 1


def test_what_cannot_run_is_refused() -> None:
    from calibration.executor.tiles.offers import offered

    with pytest.raises(InputError, match="a divisor of"):
        attention(8, kv_heads=3)
    with pytest.raises(InputError, match="a power of two"):
        conv(1, 4, 4, 48)
    with pytest.raises(InputError, match="a divisor of 9 steps"):
        conv(1, 4, 4, 16, slices=2)
    with pytest.raises(InputError, match="one of mlp"):
        offered("pool", (1, 2, 3))
    with pytest.raises(InputError, match="rows, hidden, inner"):
        offered("mlp", (1, 2))
