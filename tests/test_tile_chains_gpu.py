"""Attention and convolutions on a GPU: every policy against float64, on shapes of models."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from batchsim.tiles.policy import policies
from tests.tile_chains import worst_error

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
TOLERANCE = 1e-2  # bfloat16 rounds to 2^-9
LIMIT_NS = 50_000_000


@pytest.mark.parametrize(("kind", "sizes"), [
    ("attention", (1, 512, 4, 4, 64)), ("attention", (300, 1024, 8, 2, 128)), ("attention", (1100, 1024, 8, 8, 64)),
    ("attention", (513, 4096, 32, 8, 128)),
    ("conv", (1, 7, 7, 512, 2)), ("conv", (3, 14, 14, 256, 2)), ("conv", (2, 28, 28, 128, 4)),
    ("conv", (5, 56, 56, 64, 2)), ("conv", (3, 13, 9, 128, 3)),
])  # fmt: skip
def test_every_offer_computes_the_chain_at_every_policy(kind: str, sizes: tuple[int, ...]) -> None:
    from calibration.executor.tiles.offers import make_chain, offered

    chain = None
    for tilings in offered(kind, sizes):
        chain = make_chain(kind, sizes, tilings, chain)
        for policy in policies(chain.chain):
            error = worst_error(chain, policy, range(3), limit=LIMIT_NS, graph=True)
            assert error < TOLERANCE, (tilings, policy.name)


@pytest.mark.parametrize(("kind", "sizes"), [("attention", (700, 1024, 8, 2, 128)), ("conv", (2, 14, 14, 256, 3))])
def test_the_library_computes_the_same(kind: str, sizes: tuple[int, ...]) -> None:
    from calibration.executor.tiles.offers import make_chain, offered

    chain = make_chain(kind, sizes, offered(kind, sizes)[0])
    chain.poison(1)
    chain.out.copy_(chain.library())
    assert chain.error() < TOLERANCE


@pytest.mark.parametrize(("kind", "sizes"), [("attention", (1024, 2048, 16, 4, 128)), ("conv", (8, 28, 28, 128, 2))])
def test_a_dropped_dependence_gives_wrong_numbers(kind: str, sizes: tuple[int, ...]) -> None:
    from calibration.executor.tiles.offers import make_chain, offered

    chain = make_chain(kind, sizes, offered(kind, sizes)[0])
    for policy in policies(chain.chain)[1:]:
        wrong = dataclasses.replace(
            policy, order=np.roll(policy.order, 1), waits_from=np.zeros_like(policy.waits_from)
        )  # fmt: skip
        assert not worst_error(chain, wrong, range(1), limit=LIMIT_NS) < TOLERANCE, policy.name
