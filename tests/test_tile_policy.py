"""Policies follow from the declared dependence: what they wait for covers what is read, or they are refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchsim.tiles.graph import Chain, Dependence, GraphError, Index, Interval, Kernel, Region, TileId, whole
from batchsim.tiles.policy import (
    STREAM_SYNC,
    Grouping,
    Policy,
    PolicyError,
    blocked_tile,
    compile_policy,
    groupings,
    policies,
    prove,
)
from batchsim.tiles.shapes import Tiling, attention, conv_pair, gated_mlp, mlp, split_gated_mlp
from tests.tile_emulator import StuckError, consumers_first, emulate, in_sequence, without_wait

SMALL, WIDE, SPLIT = Tiling(4, 4, 2), Tiling(6, 8, 4), Tiling(4, 8, 2, slices=2)
CHAINS = [
    mlp(12, 8, 16, SMALL, SMALL),
    mlp(13, 10, 20, WIDE, SMALL),
    mlp(9, 16, 24, SPLIT, SPLIT),
    gated_mlp(12, 8, 16, WIDE, SMALL),
    split_gated_mlp(10, 8, 16, SMALL, SPLIT),
    attention(12, 16, 4, 2, 4, SMALL, Tiling(4, 4, 2), WIDE),
    attention(10, 16, 4, 4, 4, WIDE, Tiling(5, 4, 2), SMALL),
    conv_pair(2, 4, 3, 8, SMALL, WIDE, convs=3),
    conv_pair(1, 5, 5, 4, WIDE, SMALL),
]
NAMES = [f"{chain.name} {index}" for index, chain in enumerate(CHAINS)]
EVERY = [(chain, policy) for chain in CHAINS for policy in policies(chain)]


def agrees(policy: Policy, slots: int, seed: int) -> bool:
    wanted = in_sequence(policy.chain)
    return all(np.allclose(got, want) for got, want in zip(emulate(policy, slots, seed), wanted, strict=True))


@pytest.mark.parametrize("chain", CHAINS, ids=NAMES)
def test_every_policy_computes_the_same_in_any_interleaving(chain: Chain) -> None:
    for policy, slots in product(policies(chain), (1, 3, 50)):
        assert all(agrees(policy, slots, seed) for seed in range(3)), policy.name


@pytest.mark.parametrize("chain", CHAINS, ids=NAMES)
def test_the_finest_policy_waits_for_nothing_in_vain(chain: Chain) -> None:
    """Without any one of its waits it is refused."""
    producers = {dependence.producer for dependence in chain.dependences}
    finest = [groupings(chain, k)[0] if k in producers else None for k in range(len(chain.kernels))]
    policy = compile_policy(chain, finest)
    prove(policy)
    for entry in range(len(policy.wait_step)):
        with pytest.raises(PolicyError, match="reads tile"):
            prove(without_wait(policy, entry))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_policy_that_is_too_lax_is_refused(data: st.DataObject) -> None:
    """One wait too late, for too little, or for a semaphore that its producer does not post to."""
    _, policy = data.draw(st.sampled_from([each for each in EVERY if not each[1].barrier]))
    entry = data.draw(st.integers(0, len(policy.wait_step) - 1))
    kind = data.draw(st.sampled_from(["late", "little", "other"]))
    if kind == "late":
        steps = policy.wait_step.copy()
        steps[entry] += 1
        changed = replace(policy, wait_step=steps)
    elif kind == "little":
        values = policy.wait_value.copy()
        values[entry] -= 1
        changed = replace(policy, wait_value=values)
    else:
        posts = policy.posts.copy()
        posts[np.flatnonzero(posts == policy.wait_semaphore[entry])[0]] = -1
        changed = replace(policy, posts=posts)
    with pytest.raises(PolicyError):
        prove(changed)


def test_a_dropped_dependence_reads_what_is_not_written() -> None:
    """The compiler refuses it; made to run all the same, some interleaving leaves poison in the output."""
    chain = conv_pair(2, 4, 4, 8, Tiling(4, 8), Tiling(4, 8))
    policy = compile_policy(chain, [groupings(chain, 0)[0], None])
    halo = int(policy.waits_from[chain.bases[1] + 3]) + 1  # the tile above its own
    wrong = without_wait(policy, halo)
    with pytest.raises(PolicyError, match=r"reads tile \(2, 0, 0\) of conv1"):
        prove(wrong)
    spoiled = [np.isnan(emulate(wrong, 50, seed)[1]).any() for seed in range(20)]
    assert any(spoiled)
    assert not any(np.isnan(emulate(policy, 50, seed)[1]).any() for seed in range(20))


class TestProgress:
    CHAIN = mlp(8, 8, 8, SMALL, SMALL)

    def policy(self, name: str) -> Policy:
        (grouping,) = (each for each in groupings(self.CHAIN, 0) if each.name == name)
        return consumers_first(compile_policy(self.CHAIN, [grouping, None]))

    @pytest.mark.parametrize("name", ["TileSync", "RowSync"])
    def test_consumers_first_need_a_slot_more_than_there_are_consumers(self, name: str) -> None:
        policy = self.policy(name)
        consumers = self.CHAIN.kernels[1].tiles
        with pytest.raises(PolicyError, match="for tiles that no slot is left for"):
            prove(policy, consumers)
        with pytest.raises(StuckError):
            emulate(policy, consumers, 0)
        prove(policy, consumers + 1)
        assert agrees(policy, consumers + 1, 0)

    def test_without_a_number_of_slots_such_an_order_is_refused(self) -> None:
        with pytest.raises(PolicyError, match="before their producers"):
            prove(self.policy("TileSync"))

    @settings(max_examples=60, deadline=None)
    @given(st.randoms(use_true_random=False), st.integers(1, 8), st.sampled_from(["TileSync", "RowSync"]))
    def test_the_proof_agrees_with_the_emulation(self, rng: object, slots: int, name: str) -> None:
        policy = self.policy(name)
        order = policy.order.tolist()
        rng.shuffle(order)  # type: ignore[attr-defined]
        policy = replace(policy, order=np.array(order, dtype=np.int32))
        if blocked_tile(policy, slots) is None:
            prove(policy, slots)
            assert agrees(policy, slots, 1)
        else:
            with pytest.raises(StuckError):
                emulate(policy, slots, 1)


class TestGroupings:
    def names(self, chain: Chain) -> list[str]:
        return [grouping.name for grouping in groupings(chain, 0)]

    def test_from_the_finest_to_the_coarsest_of_a_product(self) -> None:
        chain = mlp(64, 64, 64, SMALL, SMALL)
        assert self.names(chain) == [
            "TileSync", "TileSync/2", "TileSync/4", "TileSync/8", "RowSync", "RowSync/2", "RowSync/4",
        ]  # fmt: skip

    def test_slices_of_one_tensor_are_strided(self) -> None:
        """A head reads its columns of Q, of K and of V; a gated product reads a column of either half."""
        heads = attention(64, 32, 8, 8, 4, SMALL, Tiling(4, 4, 4), SMALL)
        assert "StridedSync" in self.names(heads)
        strided = next(each for each in groupings(heads, 0) if each.name == "StridedSync")
        assert [set(np.flatnonzero(strided.semaphore[0] == head)) for head in range(8)] == [
            {head, head + 8, head + 16} for head in range(8)
        ]

    def test_a_convolution_reads_beyond_its_own_rows(self) -> None:
        assert self.names(conv_pair(4, 8, 8, 16, SMALL, SMALL))[0] == "Conv2DTileSync"

    @pytest.mark.parametrize("chain", CHAINS, ids=NAMES)
    def test_no_two_are_alike_and_semaphores_are_numbered_without_gaps(self, chain: Chain) -> None:
        offered = groupings(chain, 0)
        assert len({each.semaphore.tobytes() for each in offered}) == len(offered)
        for each in offered:
            assert set(np.unique(each.semaphore)) == set(range(each.semaphores))

    def test_any_coarser_grouping_compiles_and_holds(self) -> None:
        chain = CHAINS[0]
        grouping = Grouping("Diagonal", np.add.outer(np.arange(3), np.arange(4)).astype(np.int32))
        policy = compile_policy(chain, [grouping, None])
        prove(policy)
        assert agrees(policy, 4, 0)

    def test_a_grouping_of_another_grid_is_refused(self) -> None:
        with pytest.raises(PolicyError, match="of a grid"):
            compile_policy(CHAINS[0], [Grouping("G", np.zeros((1, 1), dtype=np.int32)), None])


class TestPolicies:
    @pytest.mark.parametrize("chain", CHAINS, ids=NAMES)
    def test_the_baseline_comes_first_and_names_are_distinct(self, chain: Chain) -> None:
        found = policies(chain)
        assert found[0].name == STREAM_SYNC and found[0].barrier
        assert len({policy.name for policy in found}) == len(found)

    @pytest.mark.parametrize("chain", CHAINS, ids=NAMES)
    def test_a_semaphore_counts_the_tiles_that_post_to_it(self, chain: Chain) -> None:
        for policy in policies(chain)[1:]:
            posted = np.bincount(policy.posts[policy.posts >= 0], minlength=policy.semaphores)
            assert (posted[policy.wait_semaphore] == policy.wait_value).all()

    def test_a_kernel_that_others_read_needs_a_grouping(self) -> None:
        with pytest.raises(PolicyError, match="no grouping for up"):
            compile_policy(CHAINS[0], [None, None])

    def test_an_order_hands_out_every_tile_once(self) -> None:
        policy = policies(CHAINS[0])[1]
        with pytest.raises(PolicyError, match="every tile once"):
            prove(replace(policy, order=np.zeros_like(policy.order)))

    def test_a_stream_runs_its_kernels_in_order(self) -> None:
        with pytest.raises(PolicyError, match="not launched in their order"):
            prove(consumers_first(compile_policy(CHAINS[0])))


class TestGraph:
    @pytest.mark.parametrize("chain", CHAINS, ids=NAMES)
    def test_needs_are_the_tiles_of_the_elements_that_are_read(self, chain: Chain) -> None:
        for dependence in chain.dependences:
            producer, consumer = chain.kernels[dependence.producer], chain.kernels[dependence.consumer]
            for tile in consumer:
                elements = {
                    (row // producer.tile[0], col // producer.tile[1])
                    for (top, bottom), (left, right) in chain.spans(dependence, tile)
                    for row in range(top, bottom)
                    for col in range(left, right)
                }
                needs = chain.needs(dependence, tile)
                assert {(need.row, need.col) for need in needs} == elements
                assert all(0 <= need.step < max(consumer.steps.at(tile), 1) for need in needs)

    def test_a_convolution_reads_its_pixels_and_a_halo_of_a_line_and_a_pixel(self) -> None:
        height, width, tile = 5, 4, 4
        chain = conv_pair(1, height, width, 8, Tiling(tile, 8), Tiling(tile, 8))
        (dependence,) = chain.dependences
        for row in range(chain.kernels[1].grid[0]):
            pixels = range(row * tile, min((row + 1) * tile, height * width))
            taps = {
                (p // width + dy) * width + p % width + dx
                for p in pixels
                for dy, dx in product((-1, 0, 1), repeat=2)
                if 0 <= p // width + dy < height and 0 <= p % width + dx < width
            }
            read = {need.row for need in chain.needs(dependence, TileId(row, 0))}
            assert {tap // tile for tap in taps} <= read

    def test_grouped_heads_read_the_keys_of_their_group(self) -> None:
        chain = attention(8, 16, 4, 2, 4, Tiling(8, 4), Tiling(8, 4, 4), SMALL)
        columns = [{need.col for need in chain.needs(chain.dependences[0], TileId(0, head))} for head in range(4)]
        assert columns == [{0, 4, 6}, {1, 4, 6}, {2, 5, 7}, {3, 5, 7}]

    def test_a_causal_tile_reads_keys_up_to_its_own_queries(self) -> None:
        chain = attention(16, 16, 4, 4, 4, Tiling(4, 4), Tiling(4, 4, 4), SMALL)
        for row in range(4):
            needs = chain.needs(chain.dependences[0], TileId(row, 0))
            assert {need.row for need in needs if need.col == 4} == set(range(row + 1))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"rows": 0}, "rows is 0"),
            ({"slices": 0}, "slices is 0"),
            ({"occupancy": -1}, "occupancy is -1"),
            ({"tile": (0, 4)}, "holds none"),
        ],
    )
    def test_an_empty_kernel_is_refused(self, change: dict[str, int], message: str) -> None:
        with pytest.raises(GraphError, match=message):
            replace(Kernel("k", 8, 8, (4, 4), Index(1)), **change)  # type: ignore[arg-type]

    def test_a_kernel_depends_on_those_before_it_once(self) -> None:
        kernel = Kernel("k", 8, 8, (4, 4), Index(1))
        edge = Dependence(0, 1, (Region(whole(8), whole(8)),))
        for edges in ((replace(edge, producer=1, consumer=1),), (edge, edge)):
            with pytest.raises(GraphError):
                Chain("c", (kernel, kernel), edges)
        with pytest.raises(GraphError, match="no kernel"):
            Chain("c", ())

    def test_an_interval_is_cut_off_at_the_tensor(self) -> None:
        halo = Interval(Index(start=-3, row=4), Index(start=7, row=4))
        assert [halo.at(TileId(row, 0), 8) for row in (0, 1)] == [(0, 7), (1, 8)]
