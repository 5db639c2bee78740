"""Laws of the model of the multiprocessors: what must hold whatever the costs are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from math import ceil

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from batchsim.tiles import sm
from batchsim.tiles.compare import choose, programmatic, rank, stream_k
from batchsim.tiles.graph import Chain, Dependence, Index, Interval, Kernel, Region, whole
from batchsim.tiles.policy import Policy, PolicyError, compile_policy, groupings, policies, prove
from batchsim.tiles.shapes import Tiling, conv_pair, mlp, split_gated_mlp
from batchsim.tiles.sm import TileCost, TileDevice, TileRun, TileSpan, simulate
from tests.tile_emulator import consumers_first

TILING = Tiling(4, 4, 2)
BUSY = TileDevice(
    "busy", 5, dram_bytes_per_ns=40.0, l2_bytes_per_ns=90.0, l2_bytes=20_000.0, launch_gap_ns=700.0, post_ns=90.0,
    wait_ns=30.0, refill_ns=110.0, overlap=3.0, spread=0.02,
)  # fmt: skip
COST = TileCost(100.0, 50.0, 70.0, 900.0, 1500.0, reduce_ns=60.0)
CHAINS = [
    mlp(20, 24, 32, TILING, TILING),
    mlp(18, 16, 40, Tiling(4, 8, 2, occupancy=2), Tiling(6, 4, 4, slices=2, occupancy=3)),
    split_gated_mlp(12, 16, 24, TILING, Tiling(4, 4, 4, occupancy=2)),
    conv_pair(2, 4, 4, 8, TILING, TILING, convs=3),
]


def quiet(sms: int) -> TileDevice:
    """A device on which nothing costs anything but the tiles themselves."""
    return TileDevice("quiet", sms)


def slots_of(kernel: Kernel, device: TileDevice) -> int:
    return kernel.occupancy * device.sms


def durations(policy: Policy, cost: TileCost) -> list[int]:
    """Of every tile by itself."""
    kernels = policy.chain.kernels
    return [
        round(cost.start_ns + kernel.steps.at(tile) * cost.step_ns + cost.end_ns)
        for kernel in kernels
        for tile in kernel
    ]


def producers_of(policy: Policy) -> list[set[int]]:
    """The tiles that each tile reads, all of them before its first iteration or later."""
    chain = policy.chain
    found: list[set[int]] = [set() for _ in range(chain.tiles)]
    for dependence in chain.dependences:
        producer, consumer = chain.kernels[dependence.producer], chain.kernels[dependence.consumer]
        for tile in consumer:
            for need in chain.needs(dependence, tile):
                first = chain.bases[dependence.producer] + (need.row * producer.grid[1] + need.col) * producer.slices
                number = chain.bases[dependence.consumer] + consumer.number(tile)
                found[number].update(range(first, first + producer.slices))
    return found


def recorded(policy: Policy, device: TileDevice, cost: TileCost = COST) -> tuple[TileRun, dict[int, TileSpan]]:
    """A run, and its spans by the number of their tile."""
    run = simulate(policy, {"": cost}, device, record=True)
    chain = policy.chain
    spans = {}
    for span in run.spans:
        _, cols, slices = chain.kernels[span.kernel].grid
        spans[chain.bases[span.kernel] + (span.row * cols + span.col) * slices + span.slice] = span
    return run, spans


everywhere = pytest.mark.parametrize(
    "policy", [each for chain in CHAINS for each in policies(chain)], ids=lambda p: f"{p.chain.name} {p.name}"
)


class TestWaves:
    @given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 9), st.integers(1, 4), st.integers(1, 9))
    def test_equal_tiles_take_as_many_waves_as_fill_the_slots(
        self, rows: int, cols: int, sms: int, occupancy: int, steps: int
    ) -> None:
        kernel = Kernel("k", rows, cols, (1, 1), Index(steps), occupancy=occupancy)
        cost = TileCost(30.0, 11.0, 7.0, share=1 / occupancy)
        run = simulate(compile_policy(Chain("c", (kernel,))), {"": cost}, quiet(sms))
        waves = ceil(kernel.tiles / (sms * occupancy))
        assert run.total_ns == waves * (11 + 30 * steps + 7)
        assert run.waves == waves

    def test_a_kernel_waits_for_the_one_before_it_and_the_launch(self) -> None:
        chain = mlp(16, 16, 16, TILING, TILING)
        device = replace(quiet(10), launch_gap_ns=500.0)
        tile_ns = 50 + 8 * 100 + 70
        assert simulate(compile_policy(chain), {"": COST}, device).total_ns == 2 * 2 * tile_ns + 500

    def test_kernels_that_overlap_fill_the_last_wave(self) -> None:
        """Three times half a wave more than whole ones, kernel by kernel or together."""
        chain = mlp(24, 16, 16, Tiling(4, 4), Tiling(4, 4))
        rowsync = next(policy for policy in policies(chain) if policy.name == "RowSync")
        device = quiet(16)
        alone, together = (simulate(policy, {"": COST}, device) for policy in (compile_policy(chain), rowsync))
        tile_ns = 50 + 100 + 70
        assert (alone.total_ns, together.total_ns) == (4 * tile_ns, 3 * tile_ns)
        assert (alone.waves, together.waves) == (4, 3)
        assert (alone.utilisation, together.utilisation) == (0.75, 1.0)


class TestBounds:
    @everywhere
    @pytest.mark.parametrize("sms", [1, 2, 5, 40])
    def test_no_run_beats_its_critical_path_or_its_work(self, policy: Policy, sms: int) -> None:
        run = simulate(policy, {"": replace(COST, share=0.3)}, quiet(sms))
        each, longest = durations(policy, COST), list[int]()
        for duration, before in zip(each, producers_of(policy), strict=True):
            # A main loop may begin before all of its inputs are there: only its last iteration has to come after.
            last = 100 + 70 if before else duration
            longest.append(max((longest[tile] for tile in before), default=0) + last)
        assert run.total_ns >= max(longest)
        kernels = policy.chain.kernels
        work = sum(each[tile] / kernels[kernel].occupancy for tile, kernel in enumerate(policy.kernel_of))
        assert run.total_ns >= work / sms * (1 - 1e-9)
        assert run.utilisation <= 1 + 1e-9

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 3), st.integers(1, 3))
    def test_greedy_is_close_to_the_best_of_all_schedules(self, sizes: list[int], inner: int, sms: int) -> None:
        """Within 2 - 1/m of it (Graham, 1969): tiles of unlike lengths, and consumers of whole rows."""
        rows = len(sizes)
        assume(rows * (inner + 1) <= 7)
        slope = 1 + sizes[0] % 3  # tiles of later rows take longer
        first = Kernel("first", rows, inner, (1, 1), Index(sizes[-1], row=slope))
        second = Kernel("second", rows, 1, (1, 1), Index(sizes[0]))
        row = Interval(Index(row=1), Index(start=1, row=1))
        chain = Chain("c", (first, second), (Dependence(0, 1, (Region(row, whole(inner)),)),))
        for grouping in groupings(chain, 0):
            policy = compile_policy(chain, [grouping, None])
            run = simulate(policy, {"": TileCost(10.0)}, quiet(sms))
            best = shortest(durations(policy, TileCost(10.0)), producers_of(policy), sms)
            assert best <= run.total_ns <= (2 - 1 / sms) * best


def shortest(duration: Sequence[int], before: Sequence[set[int]], machines: int) -> int:
    """The shortest makespan: every order of the tiles, each placed as early as it can be. Equal tiles are alike."""
    best = sum(duration)
    seen = set()
    for order in permutations(range(len(duration))):
        kinds = tuple((duration[tile], tuple(sorted(before[tile]))) for tile in order)
        place = {tile: index for index, tile in enumerate(order)}
        if kinds in seen or any(place[b] > place[tile] for tile in order for b in before[tile]):
            continue
        seen.add(kinds)
        free, end = [0] * machines, [0] * len(duration)
        for tile in order:
            ready = max((end[b] for b in before[tile]), default=0)
            machine = max((m for m in range(machines) if free[m] <= ready), key=free.__getitem__, default=None)
            if machine is None:
                machine = min(range(machines), key=free.__getitem__)
            end[tile] = free[machine] = max(free[machine], ready) + duration[tile]
        best = min(best, max(end))
    return best


class TestTiles:
    @everywhere
    @pytest.mark.parametrize("device", [quiet(3), BUSY, replace(BUSY, sms=2, overlap=0.0)], ids=["quiet", "5", "2"])
    def test_every_tile_runs_once_and_holds_a_slot_of_its_own(self, policy: Policy, device: TileDevice) -> None:
        run, spans = recorded(policy, device)
        assert len(run.spans) == policy.chain.tiles and set(spans) == set(range(policy.chain.tiles))
        assert max(span.end_ns for span in run.spans) == run.total_ns
        occupancy = [kernel.occupancy for kernel in policy.chain.kernels]
        for at in {span.start_ns for span in run.spans}:
            there = [span for span in run.spans if span.start_ns <= at < span.end_ns]
            assert len({(span.sm, span.slot) for span in there}) == len(there)
            taken = np.bincount([s.sm for s in there], [1 / occupancy[s.kernel] for s in there], device.sms)
            assert (taken <= 1 + 1e-9).all()

    @everywhere
    @pytest.mark.parametrize("device", [quiet(3), BUSY], ids=["quiet", "busy"])
    def test_no_iteration_comes_before_what_it_reads_is_posted(self, policy: Policy, device: TileDevice) -> None:
        chain = policy.chain
        _, spans = recorded(policy, replace(device, spread=0.0))
        for dependence in chain.dependences:
            producer, consumer = chain.kernels[dependence.producer], chain.kernels[dependence.consumer]
            for tile in consumer:
                span = spans[chain.bases[dependence.consumer] + consumer.number(tile)]
                for need in chain.needs(dependence, tile):
                    first = (need.row * producer.grid[1] + need.col) * producer.slices
                    written = max(
                        spans[chain.bases[dependence.producer] + first + share].end_ns
                        for share in range(producer.slices)
                    )
                    # Iterations take no less than they do alone: the latest moment at which this one may have begun.
                    latest = span.end_ns - COST.end_ns - (consumer.steps.at(tile) - need.step) * COST.step_ns
                    assert written <= latest

    @everywhere
    def test_tiles_are_handed_out_in_their_order(self, policy: Policy) -> None:
        _, spans = recorded(policy, BUSY)
        starts = [spans[tile].start_ns for tile in policy.order.tolist()]
        assert starts == sorted(starts)

    def test_a_tile_that_waits_holds_its_slot(self) -> None:
        """One producer, two multiprocessors: a consumer takes the second, waits, and no other tile gets in."""
        chain = mlp(4, 8, 4, Tiling(4, 4), Tiling(4, 4))
        (policy,) = (policy for policy in policies(chain) if not policy.barrier)
        _, spans = recorded(policy, quiet(2))
        producer, waiter, later = (spans[tile] for tile in range(3))
        assert (waiter.start_ns, waiter.sm, waiter.slot) == (0, 1, 0)
        assert waiter.waits == ((50, producer.end_ns),)
        assert (later.start_ns, later.sm) == (producer.end_ns, producer.sm)

    def test_a_main_loop_runs_up_to_the_iteration_that_it_has_to_wait_at(self) -> None:
        chain = mlp(4, 4, 8, Tiling(4, 4, 4), Tiling(4, 4, 1))
        policy = compile_policy(chain, [groupings(chain, 0)[0], None])
        device = replace(quiet(2), post_ns=5.0, refill_ns=13.0)
        _, spans = recorded(policy, device)
        # Two producers of one iteration each fill the device; the consumer follows the first, which is there already.
        assert [spans[tile].end_ns for tile in (0, 1)] == [225, 225]
        assert spans[2].waits == () and spans[2].end_ns == 225 + 50 + 8 * 100 + 70
        uneven = replace(policy, order=np.array([0, 2, 1], dtype=np.int32))
        (begin, end), *_ = recorded(uneven, quiet(3))[1][2].waits
        assert begin == 50 and end == 220

    def test_a_poll_is_paid_for_each_entry(self) -> None:
        chain = mlp(4, 4, 16, Tiling(4, 4, 4), Tiling(4, 4, 1))
        policy = compile_policy(chain, [groupings(chain, 0)[0], None])
        one = simulate(policy, {"": COST}, quiet(1)).total_ns
        assert simulate(policy, {"": COST}, replace(quiet(1), wait_ns=25.0)).total_ns == one + 4 * 25

    def test_shares_of_a_tile_are_added_one_after_the_other(self) -> None:
        kernel = Kernel("k", 4, 4, (4, 4), Index(3), slices=3)
        run = simulate(compile_policy(Chain("c", (kernel,))), {"": replace(COST, reduce_ns=40.0)}, quiet(4))
        assert run.total_ns == 50 + 300 + 3 * 40 + 70

    def test_the_wait_kernel_keeps_consumers_off(self) -> None:
        chain = mlp(4, 4, 4, Tiling(4, 4), Tiling(4, 4))
        (policy,) = (policy for policy in policies(chain) if not policy.barrier)
        _, spans = recorded(policy, replace(quiet(2), wait_kernel_ns=123.0))
        assert spans[1].start_ns == 123


class TestSharing:
    KERNEL = Kernel("k", 4, 4, (1, 1), Index(10), occupancy=2)

    def total_ns(self, cost: TileCost, device: TileDevice, kernel: Kernel = KERNEL) -> int:
        return simulate(compile_policy(Chain("c", (kernel,))), {"": cost}, device).total_ns

    def test_blocks_on_one_multiprocessor_share_it(self) -> None:
        for share, slower in ((1.0, 2.0), (0.75, 1.5), (0.5, 1.0)):
            assert self.total_ns(TileCost(100.0, share=share), quiet(8)) == slower * 1000

    def test_tiles_of_a_row_load_it_once_if_they_begin_together(self) -> None:
        cost, kernel = TileCost(100.0, row_bytes=100.0), replace(self.KERNEL, occupancy=1)
        device = TileDevice("d", 16, dram_bytes_per_ns=2.0)
        assert self.total_ns(cost, device, kernel) == 10 * 4 * 100 / 2  # four rows
        assert self.total_ns(cost, replace(device, dram_bytes_per_ns=0.0, l2_bytes_per_ns=4.0), kernel) == 10 * 16 * 25

    def test_what_one_tile_leaves_of_its_share_the_others_get(self) -> None:
        """Kernels at once, one of them without loads: it does not slow down, and the other has all of the bandwidth."""
        first = replace(self.KERNEL, occupancy=1, cost="loads")
        chain = Chain("c", (first, replace(first, cost="none")))
        costs = {"loads": TileCost(100.0, col_bytes=100.0), "none": TileCost(100.0)}
        policy = replace(compile_policy(chain), barrier=False)
        run = simulate(policy, costs, TileDevice("d", 32, dram_bytes_per_ns=2.0), record=True)
        ends = {span.kernel: span.end_ns for span in run.spans}
        assert ends == {0: 10 * 4 * 100 / 2, 1: 1000}

    @pytest.mark.parametrize("order", [1.0, 2.0, 8.0])
    def test_loads_and_arithmetic_join_as_their_norm(self, order: float) -> None:
        kernel = Kernel("k", 1, 1, (1, 1), Index(1000))
        device = TileDevice("d", 1, dram_bytes_per_ns=2.0, overlap=order)
        total = self.total_ns(TileCost(30.0, col_bytes=80.0), device, kernel)
        assert total == pytest.approx(1000 * (30**order + 40**order) ** (1 / order), abs=1)

    @everywhere
    @pytest.mark.parametrize("overlap", [0.0, 2.0])
    def test_no_more_bytes_move_than_the_bandwidth_allows(self, policy: Policy, overlap: float) -> None:
        kernels = policy.chain.kernels
        device = replace(BUSY, spread=0.0, overlap=overlap)
        total_ns = simulate(policy, {"": COST}, device).total_ns
        steps = [sum(kernel.steps.at(tile) for tile in kernel) for kernel in kernels]
        assert sum(steps) * (COST.row_bytes + COST.col_bytes) / device.l2_bytes_per_ns <= total_ns
        # From device memory every slice of an operand comes at least once.
        least = sum(
            count * (COST.row_bytes / kernel.grid[1] + COST.col_bytes / kernel.grid[0])
            for count, kernel in zip(steps, kernels, strict=True)
        )
        assert least / device.dram_bytes_per_ns <= total_ns


class TestDeadlock:
    CHAIN = mlp(8, 8, 8, Tiling(4, 4), Tiling(4, 4))

    @pytest.mark.parametrize("name", ["TileSync", "RowSync"])
    def test_consumers_first_hang_on_too_few_slots_in_the_model_as_in_the_proof(self, name: str) -> None:
        policy = consumers_first(next(policy for policy in policies(self.CHAIN) if policy.name == name))
        with pytest.raises(PolicyError):
            prove(policy, 4)
        with pytest.raises(PolicyError, match="4 tiles wait for some that no slot of quiet is free for"):
            simulate(policy, {"": COST}, quiet(4))
        prove(policy, 5)
        assert simulate(policy, {"": COST}, quiet(5)).total_ns > 0


class TestRepetition:
    @everywhere
    def test_a_run_is_the_same_each_time(self, policy: Policy) -> None:
        runs = {repr(replace(simulate(policy, {"": COST}, BUSY, record=True))) for _ in range(2)}
        assert len(runs) == 1
        assert replace(simulate(policy, {"": COST}, BUSY, record=True), spans=()) == simulate(policy, {"": COST}, BUSY)

    def test_a_chain_is_simulated_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of all layers of a forward only the first costs time, though each has a chain of its own."""
        count = 0
        run = sm._run

        def counted(*given: object) -> TileRun:
            nonlocal count
            count += 1
            return run(*given)  # type: ignore[arg-type]

        monkeypatch.setattr(sm, "_run", counted)
        device = replace(BUSY, name="never seen before")
        layers = [rank(mlp(20, 24, 32, TILING, TILING), {"": COST}, device) for _ in range(96)]
        assert count == len(policies(CHAINS[0])) == len(layers[0])
        assert all(layer == layers[0] for layer in layers)
        rank(mlp(24, 24, 32, TILING, TILING), {"": COST}, device)
        assert count > len(layers[0])


class TestChoice:
    def test_ranked_by_time(self) -> None:
        times = [run.total_ns for run in rank(CHAINS[0], {"": COST}, BUSY)]
        assert times == sorted(times)

    def test_the_baseline_stays_unless_the_gain_is_worth_it(self) -> None:
        runs = [TileRun("RowSync", 985, 1, (), 1), TileRun("StreamSync", 1000, 1, (), 1), TileRun("T", 990, 1, (), 1)]
        assert choose(runs).policy == "RowSync"
        assert choose(runs, margin=0.02).policy == "StreamSync"

    @pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.name)
    def test_stream_k_evens_out_the_last_wave(self, chain: Chain) -> None:
        device, cost = quiet(7), replace(COST, share=0.3)
        run = stream_k(chain, {"": cost}, device)
        for kernel, waves in zip(chain.kernels, run.kernel_waves, strict=True):
            assert waves <= 1, kernel.name
        iterations = [sum(kernel.steps.at(tile) for tile in kernel) for kernel in chain.kernels]
        even = [ceil(i / slots_of(k, device)) for i, k in zip(iterations, chain.kernels, strict=True)]
        assert run.total_ns == sum(50 + 100 * steps + 70 for steps in even)

    @pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.name)
    def test_dependent_launch_saves_the_gaps_at_the_most(self, chain: Chain) -> None:
        """It waits for all of the kernel before, with its prologue done: never longer than one after the other."""
        device, cost = replace(quiet(5), launch_gap_ns=300.0), {"": replace(COST, share=0.3)}
        early, late = programmatic(chain, cost, device), simulate(compile_policy(chain), cost, device)
        saved = (len(chain.kernels) - 1) * (300 + 50)
        assert late.total_ns - saved <= early.total_ns <= late.total_ns
