"""Calibrating a server whose costs are known gives those costs back; real tiny services are measured and predicted."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from batchsim.batching.batch import AnyBatch
from batchsim.batching.dynamic import DynamicBatch, DynamicBatcher, Requested
from batchsim.costs import ProfileCosts
from batchsim.dynamic_scenario import DynamicScenario
from batchsim.errors import InputError
from batchsim.machine import Burst, Costs, Latencies, SimulatedMachine
from batchsim.model import SERVICES, EncoderShape
from batchsim.operations import KernelSync
from batchsim.profile import KernelCounts, Profile, load_profile
from batchsim.records import Span
from batchsim.schedules import SCHEDULES
from calibration.cells import Samples
from calibration.services.calibrate import calibrate, grid
from calibration.services.cells import Cell, Kind, plan
from calibration.services.fit import fit_profile
from calibration.services.points import app
from calibration.services.refit import cell_of, refitted, samples_of
from calibration.services.validate import execute, validate

SIZES, LENGTHS = (1, 2, 4, 8, 16), (64, 128, 256)
KERNELS = KernelCounts(first=4, layers=12, per_layer=10, last=3, split_rows=0)
COMMAND = CliRunner()


class KnownServer:
    """Costs linear in requests and tokens with 5% noise; all host phases are dearer in the asynchronous loop."""

    def __init__(self, schedule: str, *, graphs: bool, images: bool = False, seed: int = 1) -> None:
        self.graphs, self.images = graphs, images
        self.factor = 1.2 if schedule == "async" else 1.0
        self.random = random.Random(seed)
        self.latencies = Latencies(launch_ns=25_000, copy_ns=4_000, event_ns=3_000, gap_ns=3_000, wake_up_ns=8_000)

    def host_ns(self, phase: str, batch: AnyBatch | None) -> int:
        seqs, tokens = (batch.num_seqs, batch.num_tokens) if batch else (0, 0)
        mean = {
            "schedule": 5_000 + 1_200 * seqs, "build_inputs": 12_000 + 900 * seqs + 2 * tokens * (not self.images),
            "copy_in": 7_000, "copy_out": 6_000, "record": 2_000, "stream_wait": 1_500, "wait": 1_000,
            "update": 5_000 + 400 * seqs,
        }[phase]  # fmt: skip
        return round(mean * self.factor * self.random.uniform(0.95, 1.05))

    def copy_ns(self, phase: str, batch: AnyBatch) -> int:
        if phase == "copy_out":
            return 1_500 + 60 * batch.num_seqs
        return 2_000 + (3_000 * batch.num_seqs if self.images else round(0.25 * batch.num_tokens))

    def launch(self, batch: AnyBatch, kernels: KernelSync) -> Sequence[Burst]:
        rows = next(size for size in SIZES if size >= batch.num_seqs)
        tokens = rows * batch.num_tokens // batch.num_seqs
        device = 600_000 + (90_000 * rows if self.images else 550 * tokens)
        if self.graphs:
            return (Burst((round(40_000 * self.factor),), (device,)),)
        return KERNELS.bursts(rows, round(5_000 * self.random.uniform(0.95, 1.05)), device, 0.02)


def simulated(costs: Costs, batcher: DynamicBatcher, schedule: str) -> tuple[list[Span], list[DynamicBatch]]:
    """(spans by start, batches) of one run."""

    class Log:
        def scheduled(self, batch: DynamicBatch, now_ns: int, batcher: Any) -> None:
            batches.append(batch)

        def updated(self, batch: DynamicBatch, end_ns: int) -> None: ...

        def idle(self, now_ns: int) -> None: ...

    spans: list[Span] = []
    batches: list[DynamicBatch] = []
    SimulatedMachine(batcher, costs, spans.append, log=Log()).run(SCHEDULES[schedule]())
    return sorted(spans, key=lambda span: span.start_ns), batches


def known_profile(model: str, *, images: bool) -> Profile:
    found: dict[Cell, Samples] = {}
    expected: dict[Kind, float] = dict.fromkeys(
        ((graphs, n, length) for graphs in (True, False) for n in SIZES for length in (0, *LENGTHS)), 5e6
    )
    for drill in plan(sizes=SIZES, lengths=(0,) if images else LENGTHS):
        cell = drill.cells[0]
        costs = KnownServer(cell.schedule, graphs=cell.graphs, images=images)
        found |= drill.read(*simulated(costs, drill.batcher(3, expected), cell.schedule))
    return fit_profile(
        found, name=f"h200-{model}", model=model, facts={"device": "known"}, device_memory_bytes=1 << 37,
        overlaps=True, kernels=KERNELS, copies=[],
    )  # fmt: skip


@pytest.fixture(scope="module")
def encoder() -> Profile:
    return known_profile("bert-base", images=False)


@pytest.fixture(scope="module")
def images() -> Profile:
    return known_profile("resnet-50", images=True)


def test_every_cell_is_measured_in_the_batches_that_it_names() -> None:
    drills = plan(sizes=SIZES, lengths=LENGTHS)
    assert len({cell for drill in drills for cell in drill.cells}) == sum(len(drill.cells) for drill in drills)
    expected: dict[Kind, float] = {cell.kind: 3e6 for drill in drills for cell in drill.cells}
    for drill in drills:
        assert all(cell_of(cell.key) == cell for cell in drill.cells)
        cell = drill.cells[0]
        costs = KnownServer(cell.schedule, graphs=cell.graphs)
        spans, batches = simulated(costs, drill.batcher(0, expected), cell.schedule)
        assert [(b.num_seqs, b.padded_len) for b in batches] == [(c.num_seqs, c.length) for c in drill.batches(0)]
        read = drill.read(spans, batches)
        assert set(read) == set(drill.cells)
        rests = sum(span.stage == "no_requests" for span in spans)
        assert rests == (len(batches) - 1 if cell.paced else 0)


def test_every_length_that_a_server_captures_is_measured() -> None:
    shape = SERVICES["bert-base"]
    assert isinstance(shape, EncoderShape)
    bucket = DynamicScenario.model_fields["length_bucket"].default
    assert set(grid(shape, "cuda")[1]) >= set(range(bucket, shape.max_length + 1, bucket))


def test_fits_give_the_known_costs_back(encoder: Profile, images: Profile) -> None:
    for schedule, factor in (("sync", 1.0), ("async", 1.2)):
        loop = encoder.loops[f"{schedule}/graph"]
        for n, length in ((1, 64), (3, 256), (16, 128)):
            for phase, cost in (
                ("build_inputs", 12_000 + 900 * n + 2 * n * length),
                ("schedule", 5_000 + 1_200 * n),
                ("update", 5_000 + 400 * n),
                ("launch", 40_000),
                ("copy_in", 7_000),
            ):
                found = loop.phases[phase].mean_ns(n, num_tokens=n * length)
                assert found == pytest.approx(cost * factor, rel=0.03), (schedule, phase, n)
            into = loop.copy_in_device_ns + loop.copy_in_device_seq_ns * n + loop.copy_in_device_token_ns * n * length
            assert into == pytest.approx(2_000 + 0.25 * n * length, rel=0.02)
            assert loop.copy_out_device_ns + loop.copy_out_device_seq_ns * n == pytest.approx(1_500 + 60 * n, rel=0.02)
        assert loop.launch_ns == pytest.approx(25_000, abs=500)
        assert loop.wake_up_ns + loop.gap_ns == pytest.approx(11_000, abs=500)
        pixels = images.loops[f"{schedule}/graph"]
        # Images take long enough to copy for forwards to wait for them.
        for delay, known in (("event_ns", 3_000), ("gap_ns", 3_000), ("wake_up_ns", 8_000)):
            assert getattr(pixels, delay) == pytest.approx(known, abs=500), (schedule, delay)
        assert pixels.copy_in_device_seq_ns == pytest.approx(3_000, rel=0.02)
        assert {fit.token_ns for fit in pixels.phases.values()} == {0.0}
    assert encoder.loops["sync/graph"].kernel_launch.mean_ns(1) == pytest.approx(5_000, rel=0.02)
    for curve in encoder.device.decode:
        for length in (64, 100, 256):
            assert curve.at(curve.size * length) == pytest.approx(600_000 + 550 * curve.size * length, rel=0.001)
    for curve in images.device.decode:
        assert curve.at(curve.size) == curve.at(curve.size * 64) == pytest.approx(600_000 + 90_000 * curve.size)


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("schedule", ["sync", "async"])
@pytest.mark.parametrize("delay_ns", [0, 2_000_000])
def test_predictions_hold_for_arrivals_that_no_fit_has_seen(
    encoder: Profile, schedule: str, graphs: bool, delay_ns: int
) -> None:
    """Poisson arrivals of requests of all lengths, at about half of the capacity."""
    rng = np.random.default_rng(5)
    arrivals = np.cumsum(rng.exponential(1e9 / (3_500 if graphs else 2_500), 4_000)).astype(int).tolist()
    tokens = rng.integers(1, 257, 4_000).tolist()
    means = []
    for costs in (
        KnownServer(schedule, graphs=graphs, seed=7),
        ProfileCosts(encoder, schedule, graphs=graphs, seed=3),
    ):
        requests = [Requested(i, at, tokens[i]) for i, at in enumerate(arrivals)]
        batcher = DynamicBatcher(requests, max_batch_size=16, max_queue_delay_ns=delay_ns)
        spans, batches = simulated(costs, batcher, schedule)
        ends = {span.step: span.end_ns for span in spans if span.stage == "update"}
        latency = [ends[batch.index] - request.arrival_ns for batch in batches for request in batch.requests]
        means.append([len(batches), float(np.mean(latency)), float(np.quantile(latency, 0.95))])
    np.testing.assert_allclose(means[1], means[0], rtol=0.05)


@pytest.fixture(scope="module", params=["tiny-encoder", "tiny-convnet"])
def calibrated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("profiles") / f"cpu-{request.param}.json"
    calibrate(request.param, "cpu", out, rounds=1, keep_samples=True)
    return out


def tiny(path: Path, **changes: Any) -> DynamicScenario:
    model = path.stem.removeprefix("cpu-")
    given = {
        "kind": "dynamic", "name": "tiny", "model": model, "profile": str(path), "max_batch_size": 8,
        "length_bucket": 32, "level": "operation", "seed": 4,
        "workload": {"kind": "random", "num_prompts": 120, "request_rate": 800.0, "input_len": {"dist": "randint",
                     "low": 0, "high": 128, "min": 0}},
    }  # fmt: skip
    return DynamicScenario.model_validate(given | changes)


def test_a_profile_is_whole(calibrated: Path) -> None:
    profile = load_profile(str(calibrated))
    assert (profile.name, profile.model) == (calibrated.stem, calibrated.stem.removeprefix("cpu-"))
    assert set(profile.loops) == {"sync/graph", "sync/eager", "async/graph", "async/eager"}
    for loop in profile.loops.values():
        for phase in ("schedule", "build_inputs", "copy_in", "copy_out", "record", "update"):
            assert loop.phases[phase].mean_ns(8, num_tokens=256) > 0
    assert [curve.size for curve in profile.device.decode] == [1, 2, 4, 8]
    assert profile.provenance["paced_over_busy"]


def test_a_refit_to_the_same_samples_is_the_same_profile(calibrated: Path) -> None:
    profile = load_profile(str(calibrated))
    samples = samples_of(calibrated.with_name(calibrated.name + ".partial"))
    again = refitted(profile, samples)
    assert again.loops.keys() == profile.loops.keys()
    assert again.device.decode == profile.device.decode
    paced = refitted(profile, {cell: found for cell, found in samples.items() if cell.paced or not cell.graphs})
    assert paced.loops.keys() == profile.loops.keys() and paced.device.decode != profile.device.decode


@pytest.mark.parametrize("limits", [{}, {"max_queue_size": 6, "queue_timeout_us": 2_000.0}])
def test_a_scenario_is_served_and_predicted(calibrated: Path, limits: dict[str, Any]) -> None:
    scenario = tiny(calibrated, **limits)
    predicted, measured = validate(scenario, load_profile(str(calibrated)), "cpu", repeats=1)
    for run in (predicted, measured):
        assert run.scenario == scenario.model_dump(mode="json")
        for schedule in ("sync", "async"):
            result, table = run.results[schedule], run.answered[schedule]
            outcomes = Counter(result.outcomes)
            assert outcomes.pop("arrivals") == 120 == outcomes.total()
            parts = table.latencies()
            assert (np.sum([parts[name] for name in parts if name != "e2e"], axis=0) == parts["e2e"]).all()
            assert all((values >= 0).all() for name, values in parts.items() if name != "host")
            assert sum(int(n) * count for n, count in result.batch_histogram.items()) == result.counts["requests"]
    arrivals = [run.answered["sync"].requests["arrival_ns"] for run in (predicted, measured)]
    assert (arrivals[0] == arrivals[1]).all() and len(set(arrivals[0].tolist())) > 100


def test_what_the_server_cannot_run_is_refused(calibrated: Path) -> None:
    profile = load_profile(str(calibrated))
    with pytest.raises(InputError, match="max_batch_size"):
        execute(tiny(calibrated, max_batch_size=9), profile, "cpu", repeats=1)
    with pytest.raises(InputError, match="instances"):
        execute(tiny(calibrated, instances=2), profile, "cpu", repeats=1)


def test_points_are_executed_now_and_predicted_later(calibrated: Path, tmp_path: Path) -> None:
    model = calibrated.stem.removeprefix("cpu-")
    points = tmp_path / "list.yaml"
    points.write_text(
        f"""defaults: {{schedules: [sync, async], seconds: 0.1, least: 60, length_bucket: 32, level: operation}}
points:
- {{name: half, model: {model}, seed: 1, load: 0.5, max_batch_size: 8, workload: {{kind: fixed, input_len: 40}}}}
- {{name: delay, model: {model}, load: 0.4, max_batch_size: 4, max_queue_delay_us: 1000, workload: {{kind: fixed}}}}
""",
        encoding="utf-8",
    )
    folder, profiles = tmp_path / "found", ["--profiles", str(calibrated.parent)]
    ran = ["run", str(points), "--device", "cpu", "--out", str(folder), "--repeats", "1", "--no-predicted", *profiles]
    assert COMMAND.invoke(app, ran).exit_code == 0
    before = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
    assert set(before) == {"half.json", "delay.json"} and not any("predicted" in point for point in before.values())
    told = COMMAND.invoke(app, ["predict", str(folder), *profiles])
    assert told.exit_code == 0, told.output
    for name, point in before.items():
        after = json.loads((folder / name).read_text(encoding="utf-8"))
        assert after["measured"] == point["measured"] and set(after["error"]) == {"sync", "async"}
        rate, count = (after["scenario"]["workload"][key] for key in ("request_rate", "num_prompts"))
        assert count == max(60, round(rate * 0.1))
    table = COMMAND.invoke(app, ["table", str(folder)])
    assert table.exit_code == 0 and "| half | sync |" in table.output and "4 runs of 2 points" in table.output
