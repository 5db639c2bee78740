"""Triton's tile kernels in its interpreter: every policy against float64, and policies that are wrong.

Run by `TRITON_INTERPRET=1 pytest tests/test_tile_kernels.py` where Triton is installed; no GPU is needed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from batchsim.errors import InputError, RunError
from batchsim.tiles.policy import Policy, policies

if TYPE_CHECKING:
    from calibration.executor.tiles import Mlp

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
pytestmark = [
    pytest.mark.skipif(not INTERPRETER, reason="needs TRITON_INTERPRET=1 and Triton"),
    pytest.mark.filterwarnings("default"),  # Triton's are not this project's
]
POLLS = 50
TOLERANCE = 1e-3  # float16, since the interpreter multiplies bfloat16 matrices as integers


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that small shapes have several of, in one part and in two."""
    from calibration.executor.tiles import BUILDS, Build

    for rows, cols in ((16, 32), (32, 16), (32, 48), (48, 32)):
        for gated in (False, True):
            build = Build(rows, cols, 16, warps=4, stages=3, gated=gated)
            monkeypatch.setitem(BUILDS, build.name, build)


def pair(rows: int, first: str, second: str, slices: tuple[int, int] = (1, 1), **options: Any) -> Mlp:
    from calibration.executor.tiles import Mlp, tiling

    kind = "gated" if options.get("gated") else "gemm"
    tilings = tiling(f"{kind} {first}x16", slices[0]), tiling(f"gemm {second}x16", slices[1])
    return Mlp.random(rows, 32, 48, tilings, device="cpu", dtype=torch.float16, **options)


def run(chain: Mlp, policy: Policy, seed: int = 1) -> float:
    """The error of two runs of one plan, the worse of them, poisoned before each."""
    from calibration.executor.tiles import Plan

    bound = chain.bind(Plan(policy, "cpu", limit=POLLS))
    errors = []
    for turn in (0, 1):
        chain.poison(seed + turn)
        bound.launch()
        bound.check()
        errors.append(chain.error())
    for kept in (bound.plan.state, bound.plan.semaphores, bound.plan.arrivals):
        assert not kept.any()
    return float(np.max(errors))


@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("first", "second", "slices"), [
    ("16x32", "32x16", (1, 1)), ("48x32", "32x48", (2, 3)),
])  # fmt: skip
def test_every_policy_computes_the_chain(
    rows: int, gated: bool, first: str, second: str, slices: tuple[int, int]
) -> None:
    chain = pair(rows, first, second, slices, gated=gated)
    for policy in policies(chain.chain):
        assert run(chain, policy) < TOLERANCE, policy.name


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_activations_and_two_part_tiles(activation: str) -> None:
    chain = pair(40, "32x48", "48x32", (2, 1), activation=activation)
    for policy in policies(chain.chain):
        assert run(chain, policy) < TOLERANCE, policy.name


@pytest.mark.parametrize("gated", [False, True])
def test_a_tail_computes_the_last_columns(gated: bool) -> None:
    from calibration.executor.tiles import Mlp, tiling

    first = tiling(f"{'gated' if gated else 'gemm'} 16x32x16")
    tilings = first, tiling("gemm 32x16x16"), tiling("gemm 16x32x16", 3)
    chain = Mlp.random(40, 128, 96, tilings, gated=gated, device="cpu", dtype=torch.float16)
    assert [kernel.name for kernel in chain.chain.kernels][1:] == ["down", "down tail"]
    for policy in policies(chain.chain):
        assert run(chain, policy) < TOLERANCE, policy.name


def consumer_first(policy: Policy, *, waits: bool) -> Policy:
    """The last tile of the chain taken first; with or without what it waits for."""
    order = np.roll(policy.order, 1)
    if waits:
        return dataclasses.replace(policy, order=order)
    start, end = policy.waits_from[-2:]
    waits_from = policy.waits_from.copy()
    waits_from[-1] = start
    kept = slice(0, start)
    assert end == len(policy.wait_step)
    return dataclasses.replace(
        policy, order=order, waits_from=waits_from, wait_step=policy.wait_step[kept],
        wait_semaphore=policy.wait_semaphore[kept], wait_value=policy.wait_value[kept],
    )  # fmt: skip


def test_a_dropped_dependence_gives_wrong_numbers() -> None:
    chain = pair(33, "16x32", "32x16")
    for policy in policies(chain.chain)[1:]:
        assert not run(chain, consumer_first(policy, waits=False)) < TOLERANCE, policy.name


def test_a_wait_without_end_is_given_up_and_the_plan_stays_usable() -> None:
    from calibration.executor.tiles import Plan

    chain = pair(33, "16x32", "32x16")
    policy = policies(chain.chain)[-1]
    bad = chain.bind(Plan(consumer_first(policy, waits=True), "cpu", limit=POLLS))
    chain.poison(1)
    for _ in (1, 2):
        bad.launch()
        with pytest.raises(RunError, match=r"tile \(1, 1\) of down waited .* for semaphore"):
            bad.check()
        bad.check()
    assert run(chain, policy) < TOLERANCE


def test_one_plan_serves_many_layers() -> None:
    from calibration.executor.tiles import TileMlp

    layers = [pair(20, "16x32", "32x16", gated=True, seed=seed) for seed in (0, 1)]
    shared = TileMlp(policies(layers[0].chain)[-1], layers[0].tilings, "cpu")
    for _ in (1, 2):
        for number, layer in enumerate(layers):
            layer.poison(number)
            shared(layer.x, layer.first, layer.second, *layer.written)
            assert layer.error() < TOLERANCE
    shared.check()


def test_the_trace_has_every_tile() -> None:
    from calibration.executor.tiles import Plan

    chain = pair(33, "16x32", "32x16")
    policy = policies(chain.chain)[1]
    plan = Plan(policy, "cpu", limit=POLLS, traced=True)
    chain.bind(plan).launch()
    trace = plan.trace()
    assert len(trace.start_ns) == len(trace.sm) == chain.chain.tiles


def test_what_cannot_run_is_refused() -> None:
    from calibration.executor.tiles import BUILDS, Build, Mlp, tiling

    plain, gated = tiling("gemm 16x32x16"), tiling("gated 16x32x16")
    chain, other = pair(33, "16x32", "32x16"), pair(34, "16x32", "32x16")
    with pytest.raises(InputError, match="same kernels"):
        chain.bind(policies(other.chain)[0])
    with pytest.raises(InputError, match="a multiple of 48"):
        Mlp.random(8, 32, 48, (tiling("gemm 16x32x16", 3), plain), device="cpu", dtype=torch.float16)
    with pytest.raises(InputError, match="ones for this MLP"):
        Mlp.random(8, 32, 48, (gated, plain), device="cpu", dtype=torch.float16)
    BUILDS["gemm 16x32x16"] = Build(16, 32, 16, warps=8, stages=3)
    with pytest.raises(InputError, match="same number of warps"):
        chain.bind(policies(chain.chain)[0])
    with pytest.raises(ValueError, match="two powers of two"):
        Build(16, 48, 16, warps=4, stages=3, gated=True).shape(1)
