"""Calibrating a machine whose costs are known gives those costs back, and predicts runs that no fit has seen."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from batchsim.batching.continuous import Batch, ContinuousBatcher, uniform_requests
from batchsim.machine import Burst, Latencies, SimulatedMachine
from batchsim.metrics import Metrics
from batchsim.profile import KernelCounts, Profile, ProfileCosts
from batchsim.records import Span
from batchsim.result import ScheduleResult
from batchsim.schedules import SCHEDULES
from calibration.cells import Cell, Samples, plan, read_samples
from calibration.fit import fit_profile

SIZES = (1, 2, 6, 10, 32, 80)
KERNELS = KernelCounts(first=1, layers=16, per_layer=9, last=4, split_rows=32)


class KnownMachine:
    """Host costs linear in the batch with 5% noise; device time linear in rows, context and attention pairs."""

    def __init__(self, schedule: str, *, graphs: bool, seed: int = 1) -> None:
        self.graphs = graphs
        self.factor = 1.2 if schedule == "async" else 1.0
        self.random = random.Random(seed)
        self.latencies = Latencies(launch_ns=15_000, copy_ns=4_000, event_ns=2_000, gap_ns=2_000, wake_up_ns=8_000)

    def host_ns(self, phase: str, batch: Batch | None) -> int:
        seqs = batch.num_seqs if batch else 0
        admitted = batch.admitted if batch else 0
        prefill = batch.prefill_tokens if batch else 0
        mean = {
            "schedule": 10_000 + 300 * seqs + 900 * admitted,
            "build_inputs": 30_000 + 500 * seqs + 10 * prefill,
            "copy_in": 7_000,
            "copy_out": 6_000,
            "record": 2_000,
            "stream_wait": 1_500,
            "wait": 1_000,
            "update": 5_000 + 250 * seqs,
        }[phase]
        return round(mean * self.factor * self.random.uniform(0.95, 1.05))

    def copy_ns(self, phase: str, batch: Batch) -> int:
        return 3_000

    def launch(self, batch: Batch) -> Sequence[Burst]:
        rows = next((size for size in SIZES if size >= batch.num_seqs), batch.num_seqs)
        if batch.prefill_tokens:
            device = 900_000 + 3_000 * batch.num_tokens + 0.05 * batch.prefill_pairs
        else:
            device = 900_000 + 4_000 * rows + 9 * batch.kv_tokens
        if self.graphs and not batch.prefill_tokens:
            return (Burst((round(20_000 * self.factor),), (round(device),)),)
        launch = round(6_000 * self.factor * self.random.uniform(0.95, 1.05))
        return KERNELS.bursts(
            0 if batch.prefill_tokens else rows, launch, device, 0.0 if batch.prefill_tokens else 0.15
        )


def spans_of(costs: object, batcher: ContinuousBatcher, schedule: str) -> tuple[list[Span], ScheduleResult]:
    spans: list[Span] = []
    metrics = Metrics()
    machine = SimulatedMachine(batcher, costs, lambda span: (spans.append(span), metrics(span))[0])  # type: ignore[arg-type]
    total = machine.run(SCHEDULES[schedule]())
    return sorted(spans, key=lambda s: s.start_ns), metrics.result(schedule, total, batcher)


@pytest.fixture(scope="module")
def measured() -> dict[Cell, Samples]:
    cells = plan(kv_tokens=200_000, sizes=SIZES, max_context=4096, prefill_tokens=(512, 1024, 2048))
    return {
        cell: read_samples(
            spans_of(
                KnownMachine(cell.schedule, graphs=cell.graphs),
                cell.batcher(block_size=16, num_kv_blocks=13_000),
                cell.schedule,
            )[0]
        )
        for cell in cells
    }


@pytest.fixture(scope="module")
def profile(measured: dict[Cell, Samples]) -> Profile:
    return fit_profile(
        measured,
        name="known",
        model="llama-3.2-1b",
        facts={},
        device_memory_bytes=1 << 37,
        yardstick_ns=1.0,
        kernels=KERNELS,
        copies=[],
    )


def test_fits_give_the_known_costs_back(profile: Profile) -> None:
    for loop, factor in (("sync/graph", 1.0), ("async/graph", 1.2), ("async/eager", 1.2)):
        fit = profile.loops[loop]
        phases = fit.phases
        assert phases["build_inputs"].step_ns == pytest.approx(30_000 * factor, rel=0.05)
        assert phases["build_inputs"].seq_ns == pytest.approx(500 * factor, rel=0.05)
        assert phases["update"].seq_ns == pytest.approx(250 * factor, rel=0.05)
        assert fit.kernel_launch.mean_ns(None) == pytest.approx(6_000 * factor, rel=0.02)
    sync = profile.loops["sync/graph"]
    assert sync.launch_ns == pytest.approx(15_000, abs=500)
    assert sync.wake_up_ns + sync.gap_ns == pytest.approx(10_000, abs=500)
    assert profile.device["sync"].prefill.pair_ns == pytest.approx(0.05, rel=0.05)
    assert profile.device["sync"].outer_share == pytest.approx(0.15, abs=0.01)
    assert profile.device["sync"].decode[3].slope() == pytest.approx(9, rel=0.01)


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("batch", [4, 24, 48, 70])
def test_predictions_hold_on_batches_and_contexts_that_no_fit_has_seen(
    profile: Profile, batch: int, graphs: bool
) -> None:
    gains = []
    for costs_of in (
        lambda schedule: KnownMachine(schedule, graphs=graphs, seed=7),
        lambda schedule: ProfileCosts(profile, schedule, graphs=graphs, seed=3),
    ):
        results = {}
        for schedule in SCHEDULES:
            batcher = ContinuousBatcher(
                uniform_requests(batch, 700, 150), max_num_seqs=batch, max_num_batched_tokens=2048
            )
            results[schedule] = spans_of(costs_of(schedule), batcher, schedule)[1]
        gains.append(results)
    truth, predicted = gains
    for schedule in SCHEDULES:
        assert predicted[schedule].throughput_tokens_per_s == pytest.approx(
            truth[schedule].throughput_tokens_per_s, rel=0.02
        )
        assert predicted[schedule].device_busy_fraction == pytest.approx(truth[schedule].device_busy_fraction, abs=0.01)
