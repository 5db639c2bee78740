"""Training simulated: an oracle in nanoseconds, laws of both ends (launch-bound and device-bound), what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchsim.batching.accumulation import MicroBatch, divisors, micro_batches
from batchsim.errors import InputError, RunError
from batchsim.records import Span
from batchsim.result import figures, run_json
from batchsim.schedules.training import TRAINING_SCHEDULES
from batchsim.streams import Burst, Latencies
from batchsim.timeline import trace
from batchsim.training import simulate
from batchsim.training_costs import burst, shares
from batchsim.training_machine import Loader, TrainingMachine
from tests.training_profiles import (
    ACCUMULATE_NS,
    HOST_NS,
    OPTIMIZER_HOST_NS,
    OPTIMIZER_NS,
    SEQUENCE_NS,
    TOKEN_NS,
    ZERO_GRAD_NS,
    small_training_profile,
    training,
)  # fmt: skip

FLAT = small_training_profile(ratios=(1.0,))


def step_ns(schedule: str, **changes: object) -> int:
    """The time of a steady optimiser step."""
    result = simulate(training(schedules=[schedule], jitter=False, **changes), FLAT).results[schedule]
    return round(result.step_ms["p50"] * 1e6)


@dataclass
class FixedCosts:
    """Host phases by name, and the same kernels for every micro-batch."""

    host: dict[str, int]
    kernels: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]]
    copy: int = 0
    before: int = 0
    after: int = 0
    latencies: Latencies = field(default_factory=Latencies)

    def host_ns(self, phase: str, micro: MicroBatch | None) -> int:
        return self.host.get(phase, 0)

    def copy_ns(self, micro: MicroBatch) -> int:
        return self.copy

    def bursts(self, stage: str) -> Sequence[Burst]:
        return [Burst(host, device) for host, device in self.kernels[stage]]

    def forward(self, micro: MicroBatch) -> Sequence[Burst]:
        return self.bursts("forward")

    def backward(self, micro: MicroBatch) -> Sequence[Burst]:
        return self.bursts("backward")

    def optimizer(self) -> tuple[int, Sequence[Burst], int]:
        return self.before, self.bursts("optimizer"), self.after


def oracle(schedule: str, costs: FixedCosts, micros: Iterator[MicroBatch]) -> int:
    """When the last loss has been read: kernel by kernel, with a queue that is never full."""
    now = device = copies = 0
    done: list[int] = []

    def launch(stage: str) -> None:
        nonlocal now, device
        for host, run in costs.kernels[stage]:
            for call, kernel in zip(host, run, strict=True):
                device = max(device, now) + kernel
                now += call

    def read(index: int) -> None:
        nonlocal now
        wakes = done[index] + costs.latencies.wake_up_ns if done[index] > now else now
        now = max(now + costs.host.get("wait", 0), wakes) + costs.host.get("read_loss", 0)

    for micro in micros:
        now += costs.host.get("schedule", 0) + costs.host.get("prepare", 0)
        if schedule == "sync":
            device = max(device, now) + costs.copy
            now += costs.host.get("copy_in", 0)
        else:
            copies = max(copies, now) + costs.copy
            now += costs.host.get("copy_in", 0) + costs.host.get("record", 0)
            device = max(device, copies)
            now += costs.host.get("stream_wait", 0)
        launch("forward")
        launch("backward")
        if micro.last:
            now += costs.before
            launch("optimizer")
            now += costs.after
        done.append(max(device, now))
        now += costs.host.get("record", 0)
        if schedule == "sync":
            read(micro.index)
        elif micro.index:
            read(micro.index - 1)
    if schedule == "async":
        read(len(done) - 1)
    return now


ns = st.integers(0, 50)
bursts = st.lists(
    st.lists(st.tuples(ns, ns), min_size=1, max_size=4).map(lambda pairs: tuple(zip(*pairs, strict=True))),
    min_size=1,
    max_size=3,
)
random_costs = st.builds(
    FixedCosts,
    host=st.fixed_dictionaries(
        dict.fromkeys(("schedule", "prepare", "copy_in", "record", "stream_wait", "wait", "read_loss"), ns)
    ),
    kernels=st.fixed_dictionaries(dict.fromkeys(("forward", "backward", "optimizer"), bursts)),
    copy=ns,
    before=ns,
    after=ns,
    latencies=st.builds(Latencies, wake_up_ns=ns),
)


class TestMachine:
    @given(random_costs, st.integers(1, 4), st.integers(1, 4), st.sampled_from(sorted(TRAINING_SCHEDULES)))
    @settings(deadline=None)
    def test_equals_the_recurrence_to_the_nanosecond(
        self, costs: FixedCosts, steps: int, accumulated: int, schedule: str
    ) -> None:
        spans: list[Span] = []
        machine = TrainingMachine(micro_batches(steps, accumulated, 1, 1), costs, spans.append)
        total = machine.run(TRAINING_SCHEDULES[schedule]())
        assert total == oracle(schedule, costs, micro_batches(steps, accumulated, 1, 1))
        for lane in ("host", "compute"):  # nothing overtakes, and nothing overlaps
            mine = [span for span in spans if span.lane == lane]
            assert all(a.end_ns <= b.start_ns for a, b in pairwise(mine))
        assert sum(span.stage == "update" for span in spans) == steps

    @given(random_costs, st.integers(1, 8))
    @settings(deadline=None)
    def test_a_short_queue_makes_nothing_faster_and_loses_nothing(self, costs: FixedCosts, depth: int) -> None:
        costs.latencies = Latencies()  # a host that waits for a place is told at once
        totals = []
        for places in (depth, 1024):
            spans: list[Span] = []
            machine = TrainingMachine(micro_batches(2, 2, 1, 1), costs, spans.append, launch_queue_depth=places)
            totals.append(machine.run(TRAINING_SCHEDULES["async"]()))
            assert [s.stage for s in spans if s.lane == "compute"] == ["forward", "backward"] * 2 + ["optimizer"] + [
                "forward", "backward"] * 2 + ["optimizer"]  # fmt: skip
        assert totals[0] >= totals[1]

    def test_a_loader_keeps_two_ready(self) -> None:
        loader = Loader()
        # Prepared at 10, 20; the third may begin when the first is taken, at 10.
        assert [loader.take(0, 10), loader.take(100, 10), loader.take(100, 10), loader.take(100, 10)] == [10, 0, 0, 10]


class TestLaws:
    def test_device_bound_a_step_is_the_sum_of_the_device_s_times(self) -> None:
        tokens = 4 * 4096
        micro = sum(TOKEN_NS.values()) * tokens
        expected = 4 * micro + 3 * sum(ACCUMULATE_NS.values()) + OPTIMIZER_NS
        assert step_ns("async", sequence_length=4096) == expected

    def test_launch_bound_a_step_is_the_sum_of_the_host_s_times(self) -> None:
        calls = 11_000 + 2 * 4_000 + 3_000 + 2_000 + 4 * SEQUENCE_NS
        expected = 4 * (sum(HOST_NS.values()) + calls) + 3 * 80_000 + OPTIMIZER_HOST_NS + ZERO_GRAD_NS
        assert step_ns("async", sequence_length=1) == expected

    @pytest.mark.parametrize("sequence_length", [1, 32, 256, 512, 640, 1024, 4096])
    def test_between_the_ends_neither_bound_is_beaten(self, sequence_length: int) -> None:
        tokens = 4 * sequence_length
        device = 4 * sum(TOKEN_NS.values()) * tokens + 3 * sum(ACCUMULATE_NS.values()) + OPTIMIZER_NS
        host = step_ns("async", sequence_length=1)
        found = step_ns("async", sequence_length=sequence_length, steps=25)
        assert max(device, host) <= found <= device + host
        assert found <= step_ns("sync", sequence_length=sequence_length)

    def test_checkpointing_computes_the_layers_anew(self) -> None:
        plain, full = (step_ns("async", sequence_length=4096, checkpointing=kind) for kind in ("none", "full"))
        assert full - plain == 4 * TOKEN_NS["layers"] * 4 * 4096

    @pytest.mark.parametrize("sequence_length", [1, 128, 4096])
    def test_accumulation_adds_the_same_for_every_further_micro_batch(self, sequence_length: int) -> None:
        one, two, three = (
            step_ns("sync", sequence_length=sequence_length, global_batch=4 * count, micro_batch=4)
            for count in (1, 2, 3)
        )
        assert abs((three - two) - (two - one)) <= 2  # rounding to the kernel

    def test_prefetching_hides_what_is_shorter_than_the_device_s_time(self) -> None:
        wide = {"sequence_length": 4096}
        data = {"prepare_ms_per_sequence": 5.0}
        assert step_ns("async", **wide, data=data) == step_ns("async", **wide)
        longer = step_ns("sync", **wide, data=data) - step_ns("sync", **wide)
        assert longer == 4 * 4 * (5_000_000 - SEQUENCE_NS)

    def test_data_that_take_longer_than_all_else_set_the_pace(self) -> None:
        data = {"prepare_ms_per_sequence": 100.0}
        host = step_ns("async", sequence_length=1)
        expected = host + 4 * 4 * (100_000_000 - SEQUENCE_NS)
        assert step_ns("async", sequence_length=1, data=data) == expected
        assert step_ns("async", sequence_length=1, data=data, host_threads=2) == 4 * 4 * 100_000_000

    def test_a_loader_hides_preparation_from_a_host_that_is_the_bottleneck(self) -> None:
        data = {"prepare_ms_per_sequence": 0.5}
        alone = step_ns("async", sequence_length=1, data={"prepare_ms_per_sequence": 0.0})
        assert step_ns("async", sequence_length=1, data=data, host_threads=2) == alone

    def test_a_forward_pass_that_begins_on_an_idle_device_is_led_by_launches(self) -> None:
        precision = FLAT.precisions["mixed"].model_copy(update={"lead": 0.25})
        leading = FLAT.model_copy(update={"precisions": {"mixed": precision}})

        def more(schedule: str, length: int) -> int:
            asked = training(schedules=[schedule], jitter=False, sequence_length=length)
            found = [simulate(asked, each).results[schedule].step_ms["p50"] for each in (leading, FLAT)]
            return round((found[0] - found[1]) * 1e6)

        assert more("sync", 4096) == 4 * HOST_NS["layers"] // 4  # of the step's four micro-batches
        assert more("async", 4096) == 0
        assert abs(more("async", 1)) <= HOST_NS["layers"] // 100  # bound by launches: as many as without

    def test_a_faster_host_shortens_launch_bound_steps_alone(self) -> None:
        assert step_ns("async", sequence_length=1, host_speed=2.0) == pytest.approx(
            step_ns("async", sequence_length=1) / 2, rel=1e-4
        )
        assert step_ns("async", sequence_length=4096, host_speed=2.0) == step_ns("async", sequence_length=4096)


class TestSimulate:
    def test_counts_and_throughput(self) -> None:
        found = simulate(training(), FLAT).results["sync"]
        assert found.counts == {"steps": 5, "micro_batches": 20, "tokens": 5 * 16 * 128}
        assert found.throughput_tokens_per_s == pytest.approx(found.counts["tokens"] / found.total_s)
        assert sum(found.idle_ns.values()) == pytest.approx(
            (1 - found.device_busy_fraction) * found.total_s * 1e9, rel=1e-6
        )
        assert {"forward", "backward", "optimizer", "prepare", "copy_in", "device_copy_in"} <= set(found.stage_ms)

    def test_the_same_seed_gives_the_same_run_and_another_one_another(self) -> None:
        profile = small_training_profile()
        runs = [json.dumps(run_json(simulate(training(sequence_length=1, seed=seed), profile))) for seed in (1, 1, 2)]
        assert runs[0] == runs[1] != runs[2]

    def test_jitter_keeps_the_mean(self) -> None:
        still, shaken = (
            simulate(training(sequence_length=1, steps=200, jitter=jitter), small_training_profile()).results["async"]
            for jitter in (False, True)
        )
        assert shaken.step_ms["mean"] == pytest.approx(still.step_ms["mean"], rel=0.01)
        assert shaken.step_ms["p99"] > still.step_ms["p99"]

    def test_replications_have_intervals(self) -> None:
        found = simulate(training(sequence_length=1, replications=4), small_training_profile()).results["sync"]
        assert found.interval["step_ms.mean"] > 0

    def test_what_was_not_measured_is_said(self) -> None:
        found = simulate(training(sequence_length=524_288), FLAT).results["sync"]
        assert any("2,097,152 tokens" in warning for warning in found.warnings)
        assert not simulate(training(), FLAT).results["sync"].warnings

    def test_time_to_a_target(self) -> None:
        known = {"critical_batch_tokens": 2048.0, "min_steps": 1000.0}
        found = simulate(training(critical_batch=known), FLAT).results["async"]
        assert found.to_target["steps"] == 2000  # at the critical batch twice the least
        assert found.to_target["tokens"] == 2 * 1000 * 2048
        assert found.to_target["hours"] == pytest.approx(2000 * found.step_ms["mean"] / 3.6e6)
        assert figures(found)["to_target.hours"] == found.to_target["hours"]

    def test_progress_ends_at_one(self) -> None:
        told: list[float] = []
        simulate(training(replications=2), FLAT, progress=told.append, status=lambda _: None)
        assert told == sorted(told) and told[-1] == 1.0

    def test_another_model_s_profile_is_refused(self) -> None:
        with pytest.raises(InputError, match="measured for llama-160m"):
            simulate(training(), small_training_profile(model="llama-160m"))

    @pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"optimizer": "sgd"}])
    def test_what_the_profile_lacks_is_named(self, changes: dict[str, str]) -> None:
        with pytest.raises(RunError, match=f"no costs for {next(iter(changes))}"):
            simulate(training(**changes), FLAT)

    def test_the_timeline_ties_launches_to_what_they_launch(self) -> None:
        events = trace([simulate(training(steps=6), FLAT)])["traceEvents"]
        kernels = [event for event in events if event.get("cat") == "kernel"]
        assert {"forward", "backward"} <= {event["name"] for event in kernels}
        flows = {(event["id"], event["ph"]) for event in events if event.get("cat") == "ac2g"}
        assert flows and all((number, "f") in flows for number, _ in flows)
        begun = {event["id"]: event["ts"] for event in events if event.get("cat") == "ac2g" and event["ph"] == "s"}
        assert all(begun[e["id"]] <= e["ts"] for e in events if e.get("cat") == "ac2g" and e["ph"] == "f")

    def test_the_window_is_of_the_middle(self) -> None:
        spans = simulate(training(steps=6), FLAT).windows["async"]
        assert spans and {"forward", "backward", "optimizer"} <= {span.stage for span in spans}


class TestShares:
    @given(st.integers(0, 10**12), st.integers(1, 500))
    def test_they_sum_to_the_whole_and_differ_by_one_at_most(self, total: int, count: int) -> None:
        found = shares(total, count)
        assert sum(found) == total and len(found) == count and max(found) - min(found) <= 1

    def test_a_burst_of_equal_kernels(self) -> None:
        found = burst(100, 1000, 7)
        assert (found.launch_ns, found.kernels_ns, len(found.device_ns)) == (100, 1000, 7)

    @given(st.integers(1, 5000))
    def test_divisors(self, number: int) -> None:
        assert divisors(number) == [i for i in range(1, number + 1) if number % i == 0]
