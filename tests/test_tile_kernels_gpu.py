"""Triton's tile kernels on a GPU: every policy against float64, and policies that are wrong, on shapes of models."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pytest

from batchsim.errors import RunError
from batchsim.tiles.policy import Policy, policies

if TYPE_CHECKING:
    from calibration.executor.tiles import Mlp

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
TOLERANCE = 1e-2  # bfloat16 rounds to 2^-9


def mlp(rows: int, hidden: int, inner: int, first: str, second: str, slices: tuple[int, int] = (1, 1),
        *, gated: bool = False) -> Mlp:  # fmt: skip
    from calibration.executor.tiles import Mlp, tiling

    tilings = tiling(f"{'gated' if gated else 'gemm'} {first}", slices[0]), tiling(f"gemm {second}", slices[1])
    return Mlp.random(rows, hidden, inner, tilings, gated=gated)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("first", "second", "slices"), [
    ("128x256x64", "128x256x64", (1, 1)), ("128x128x64", "128x128x64", (1, 2)), ("192x256x64", "256x192x64", (1, 1)),
    ("128x256x64", "256x192x64", (2, 3)), ("192x256x64", "192x256x64", (3, 2)), ("64x256x64", "64x128x64", (4, 1)),
])  # fmt: skip
@pytest.mark.parametrize(("rows", "hidden", "inner"), [(1, 768, 1536), (200, 1536, 768), (1100, 1536, 2304)])
def test_every_policy_computes_the_chain(
    rows: int, hidden: int, inner: int, first: str, second: str, slices: tuple[int, int], gated: bool
) -> None:
    chain = mlp(rows, hidden, inner, first, second, slices, gated=gated)
    for policy in policies(chain.chain):
        bound = chain.bind(policy)
        chain.poison(1)
        bound.launch()
        bound.check()
        assert chain.error() < TOLERANCE, policy.name
        graph = bound.capture()
        for seed in range(2, 5):
            chain.poison(seed)
            graph.replay()
            bound.check()
            assert chain.error() < TOLERANCE, (policy.name, "graph")
        chain.poison(5)
        bound.launch()
        assert chain.error() < TOLERANCE, (policy.name, "second launch")


def test_wide_tiles_and_model_shapes() -> None:
    for hidden, inner, gated in ((12288, 6144, False), (4096, 14336, True)):
        chain = mlp(520, hidden, inner, "192x256x64", "256x192x64", gated=gated)
        exact = None
        for policy in policies(chain.chain):
            bound = chain.bind(policy)
            chain.poison(1)
            exact = chain.exact() if exact is None else exact
            bound.launch()
            bound.check()
            assert chain.error(exact) < TOLERANCE, policy.name


def test_the_sum_of_shares_has_the_same_bits_in_every_run() -> None:
    chain = mlp(200, 3072, 1536, "128x128x64", "128x128x64", (4, 4))
    bound = chain.bind(policies(chain.chain)[-1])
    chain.poison(1)
    bound.launch()
    first = chain.out.clone()
    for _ in range(20):
        bound.launch()
        assert first.equal(chain.out)


def moved_first(policy: Policy, tiles: int, *, waits: bool) -> Policy:
    """The last `tiles` of the chain taken first; without waits, no tile waits at all."""
    moved = dataclasses.replace(policy, order=np.roll(policy.order, tiles))
    return moved if waits else dataclasses.replace(moved, waits_from=np.zeros_like(policy.waits_from))


def test_a_dropped_dependence_gives_wrong_numbers() -> None:
    chain = mlp(1024, 2048, 2048, "128x256x64", "128x256x64")
    for policy in policies(chain.chain)[1:]:
        bound = chain.bind(moved_first(policy, 1, waits=False))
        chain.poison(1)
        bound.launch()
        bound.check()
        assert not chain.error() < TOLERANCE, policy.name


def test_a_wait_without_end_is_given_up() -> None:
    """Consumers hold every slot. The device goes on, and so does the plan."""
    from calibration.executor.tiles import Plan

    chain = mlp(2048, 4096, 1024, "128x256x64", "128x256x64")
    policy = policies(chain.chain)[-1]
    consumers = chain.chain.kernels[1].tiles
    bound = chain.bind(Plan(moved_first(policy, consumers, waits=True), limit=2_000_000))
    bound.launch()  # compiles
    with pytest.raises(RunError):
        bound.check()
    bound.launch()
    with pytest.raises(RunError, match=r"of down waited 2 ms for semaphore"):
        bound.check()
    good = chain.bind(policy)
    chain.poison(1)
    good.launch()
    good.check()
    assert chain.error() < TOLERANCE


def test_the_trace_is_of_all_multiprocessors_and_in_order() -> None:
    import torch

    from calibration.executor.tiles import Plan

    chain = mlp(1024, 12288, 6144, "128x256x64", "128x256x64")
    policy = next(policy for policy in policies(chain.chain) if policy.name == "RowSync")
    plan = Plan(policy, traced=True)
    bound = chain.bind(plan)
    bound.launch()
    bound.check()
    trace = plan.trace()
    assert set(trace.sm) == set(range(torch.cuda.get_device_properties(0).multi_processor_count))
    assert np.all(trace.end_ns > trace.start_ns)
    assert np.all(trace.waited_ns <= trace.end_ns - trace.start_ns)
    assert np.all(trace.waited_ns[: chain.chain.kernels[0].tiles] == 0)
