"""Calibrating a machine whose costs are known gives those costs back, and predicts runs that no fit has seen."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from batchsim.batching.batch import AnyBatch
from batchsim.batching.continuous import ContinuousBatcher
from batchsim.costs import ProfileCosts
from batchsim.machine import Burst, Costs, Latencies, SimulatedMachine
from batchsim.metrics import Metrics
from batchsim.operations import KernelSync
from batchsim.profile import KernelCounts, Profile
from batchsim.records import Span
from batchsim.result import ScheduleResult
from batchsim.schedules import SCHEDULES
from calibration.cells import Cell, Samples, plan, read_samples
from calibration.fit import fit_profile
from tests.requests import uniform_requests

SIZES = (1, 2, 6, 10, 32, 80)
TILE = 64
ASYNC_FACTOR, EAGER_FACTOR, OUTER_SHARE = 1.2, 1.1, 0.15
KERNELS = KernelCounts(first=1, layers=16, per_layer=9, last=4, split_rows=32)


class KnownMachine:
    """Host costs linear in the batch with 5% noise; device time linear in rows, context and attention pairs.

    All host phases are dearer in the async loop, but a kernel's launch is not: it is the same call in both. Launched
    kernel by kernel, a few rows are bound by the host and many by the device. The host's other phases outlast the LM
    head, so that where the host is the bottleneck every forward begins on an idle device.
    """

    def __init__(self, schedule: str, *, graphs: bool, seed: int = 1) -> None:
        self.graphs = graphs
        self.factor = ASYNC_FACTOR if schedule == "async" else 1.0
        self.random = random.Random(seed)
        self.latencies = Latencies(launch_ns=15_000, copy_ns=4_000, event_ns=2_000, gap_ns=2_000, wake_up_ns=8_000)

    def host_ns(self, phase: str, batch: AnyBatch | None) -> int:
        seqs = batch.num_seqs if batch else 0
        admitted = batch.admitted if batch else 0
        prefill = batch.prefill_tokens if batch else 0
        mean = {
            "schedule": 10_000 + 300 * seqs + 900 * admitted,
            "build_inputs": 130_000 + 500 * seqs + 10 * prefill,
            "copy_in": 7_000,
            "copy_out": 6_000,
            "record": 2_000,
            "stream_wait": 1_500,
            "wait": 1_000,
            "update": 5_000 + 250 * seqs,
        }[phase]
        return round(mean * self.factor * self.random.uniform(0.95, 1.05))

    def copy_ns(self, phase: str, batch: AnyBatch) -> int:
        return 3_000

    def launch(self, batch: AnyBatch, kernels: KernelSync) -> Sequence[Burst]:
        rows = next((size for size in SIZES if size >= batch.num_seqs), batch.num_seqs)
        if batch.prefill_tokens:
            device = 900_000 + 3_000 * batch.num_tokens + 0.05 * batch.prefill_pairs(TILE) + 9 * batch.kv_tokens
        else:
            device = 900_000 + 30_000 * rows + 9 * batch.kv_tokens
        if self.graphs and not batch.prefill_tokens:
            return (Burst((round(20_000 * self.factor),), (round(device),)),)
        launch = round(6_000 * self.random.uniform(0.95, 1.05))
        if batch.prefill_tokens:
            return KERNELS.bursts(0, launch, device, 0.0)
        return KERNELS.bursts(rows, launch, device * EAGER_FACTOR, OUTER_SHARE)


def simulated(costs: Costs, batcher: ContinuousBatcher, schedule: str) -> tuple[list[Span], ScheduleResult]:
    """(spans by start, metrics) of one run."""
    spans: list[Span] = []
    metrics = Metrics()

    def observe(span: Span) -> None:
        spans.append(span)
        metrics(span)

    total = SimulatedMachine(batcher, costs, observe).run(SCHEDULES[schedule]())
    return sorted(spans, key=lambda s: s.start_ns), metrics.result(schedule, total, batcher)


@pytest.fixture(scope="module")
def measured() -> dict[Cell, Samples]:
    cells = plan(kv_tokens=200_000, sizes=SIZES, max_context=4096, prefill_tokens=(512, 1024, 2048))
    found = {}
    for cell in cells:
        batcher = cell.batcher(block_size=16, num_kv_blocks=13_000)
        spans, _ = simulated(KnownMachine(cell.schedule, graphs=cell.graphs), batcher, cell.schedule)
        found[cell] = read_samples(spans, cell)
    return found


@pytest.fixture(scope="module")
def profile(measured: dict[Cell, Samples]) -> Profile:
    return fit_profile(
        measured,
        name="known",
        model="llama-3.2-1b",
        facts={},
        device_memory_bytes=1 << 37,
        overlaps=True,
        kernels=KERNELS,
        tile=TILE,
        copies=[],
    )


@pytest.mark.parametrize("cell", [Cell("async", True, 4, 40), Cell("sync", False, 2, 0, chunk=48, decodes=2, steps=20)])
def test_steps_of_a_cell_are_alike(cell: Cell) -> None:
    """No step takes blocks but one that admits: what that costs is not what a cell measures."""
    batcher = cell.batcher(block_size=16, num_kv_blocks=100)
    read = []
    while batch := batcher.schedule():
        assert not batch.grown and not batch.preempted
        read.append((batch.num_seqs, batch.prefill_tokens, batch.admitted))
        batcher.update(batch)
    first, last = cell.read_steps
    assert set(read[first : last + 1]) == {(cell.num_seqs + cell.decodes, cell.num_seqs * cell.chunk, read[first][2])}


def test_fits_give_the_known_costs_back(profile: Profile) -> None:
    for schedule, factor in (("sync", 1.0), ("async", ASYNC_FACTOR)):
        for loop in (profile.loops[f"{schedule}/graph"], profile.loops[f"{schedule}/eager"]):
            assert loop.phases["build_inputs"].step_ns == pytest.approx(130_000 * factor, rel=0.01)
            assert loop.phases["build_inputs"].seq_ns == pytest.approx(500 * factor, rel=0.05)
            assert loop.phases["update"].seq_ns == pytest.approx(250 * factor, rel=0.05)
            assert loop.kernel_launch.mean_ns(0) == pytest.approx(6_000, rel=0.02)
        assert profile.loops[f"{schedule}/graph"].phases["launch"].mean_ns(8) == pytest.approx(
            20_000 * factor, rel=0.01
        )
    sync = profile.loops["sync/graph"]
    # Prompts are measured in batches of few sequences, so a token's and a sequence's cost are told together.
    assert sync.phases["build_inputs"].mean_ns(4, 1024, 4) == pytest.approx(130_000 + 500 * 4 + 10 * 1024, rel=0.01)
    assert sync.phases["schedule"].mean_ns(4, 1024, 4) == pytest.approx(10_000 + 300 * 4 + 900 * 4, rel=0.05)
    assert sync.launch_ns == pytest.approx(15_000, abs=500)
    assert sync.wake_up_ns + sync.gap_ns == pytest.approx(10_000, abs=500)
    device = profile.device
    assert [curve.at(10 * curve.size) for curve in device.decode] == pytest.approx(
        [900_000 + (30_000 + 90) * size for size in SIZES], rel=0.001
    )
    assert device.prefill.pair_ns == pytest.approx(0.05, rel=0.05)
    assert device.prefill.kv_ns == pytest.approx(9, rel=0.05)
    assert device.eager_factor == pytest.approx(EAGER_FACTOR, rel=0.01)
    assert device.outer_share == pytest.approx(OUTER_SHARE, abs=0.01)


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("batch", [4, 24, 48, 70])
def test_predictions_hold_on_batches_and_contexts_that_no_fit_has_seen(
    profile: Profile, batch: int, graphs: bool
) -> None:
    for schedule in SCHEDULES:
        truth, predicted = (
            simulated(
                costs,
                ContinuousBatcher(uniform_requests(batch, 700, 150), max_num_seqs=batch, max_num_batched_tokens=2048),
                schedule,
            )[1]
            for costs in (
                KnownMachine(schedule, graphs=graphs, seed=7),
                ProfileCosts(profile, schedule, graphs=graphs, seed=3),
            )
        )
        assert predicted.throughput_tokens_per_s == pytest.approx(truth.throughput_tokens_per_s, rel=0.02)
        assert predicted.device_busy_fraction == pytest.approx(truth.device_busy_fraction, abs=0.01)
