"""A profile carried from one device to another: what has to hold whatever the constants of the law are."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchsim.hardware import CATALOGUE, Device
from batchsim.hardware.device import Hardware
from batchsim.hardware.forwards import DecoderForwards
from batchsim.hardware.kernels import Kernel, decode_attention, product, projections
from batchsim.hardware.law import rules, waves
from batchsim.hardware.plans import plan_of
from batchsim.hardware.transfer import host_factor, transferred
from batchsim.model import MODELS
from batchsim.profile import Profile, load_profile

H200 = CATALOGUE["h200"]
MODEL_NAMES = ("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b")
PARTS = {"decode", "prefill", "host", "copies"}


@cache
def measured(model: str = "llama-3.1-8b") -> Profile:
    return load_profile(f"h200-{model}")


def other(**changes: object) -> Device:
    return H200.model_copy(update={"title": "other", **changes})


def faster(base: Device, factor: float) -> Device:
    return base.model_copy(
        update={
            "title": "other",
            "matrix_tflops": {dtype: rate * factor for dtype, rate in base.matrix_tflops.items()},
            "vector_tflops": {dtype: rate * factor for dtype, rate in base.vector_tflops.items()},
        }
    )


def decode_ns(profile: Profile) -> list[float]:
    return [ns for curve in profile.device.decode for ns in curve.ns]


class TestWaves:
    """Tiles in waves, as a persistent kernel's blocks take them."""

    @given(st.integers(1, 5000), st.integers(1, 264), st.integers(1, 132))
    def test_no_tile_is_lost_and_no_wave_is_larger_than_the_slots(self, tiles: int, blocks: int, slots: int) -> None:
        blocks = min(blocks, tiles)
        found = list(waves(tiles, blocks, slots))
        assert sum(n * at_once for n, at_once in found) == tiles
        assert max(at_once for _, at_once in found) <= slots

    @given(st.integers(1, 5000), st.integers(1, 132))
    def test_a_slot_for_each_block_makes_as_many_waves_as_there_must_be(self, tiles: int, blocks: int) -> None:
        blocks = min(blocks, tiles)
        assert sum(n for n, _ in waves(tiles, blocks, blocks)) == -(-tiles // blocks)

    @given(st.integers(1, 5000), st.integers(1, 132), st.integers(1, 131))
    def test_more_slots_make_no_more_waves(self, tiles: int, blocks: int, slots: int) -> None:
        blocks = min(blocks, tiles)
        count = [sum(n for n, _ in waves(tiles, blocks, at)) for at in (slots, slots + 1)]
        assert count[1] <= count[0]

    @pytest.mark.parametrize(
        ("tiles", "slots", "wanted"),
        [(128, 112, 2), (256, 120, 4), (256, 48, 6), (384, 48, 9), (512, 112, 6), (512, 80, 7), (512, 24, 22)],
    )
    def test_late_blocks_are_measured_to_wait_for_the_others(self, tiles: int, slots: int, wanted: int) -> None:
        # Times of cuBLAS's products with 256 x 128 tiles on parts of an H200, over the time of one tile.
        assert sum(n for n, _ in waves(tiles, min(tiles, 132), slots)) == wanted


class TestKernels:
    @pytest.mark.parametrize("name", MODEL_NAMES)
    def test_products_read_every_weight_and_compute_with_it(self, name: str) -> None:
        shape = MODELS[name]
        kernels = projections(shape, 1, 1)
        flops = sum(kernel.count * kernel.flops for kernel in kernels)
        # All but the embedding and the norms; two operations a weight and token.
        weights = shape.parameters - shape.vocab_size * shape.hidden_size
        assert flops == 2 * (weights - (2 * shape.num_layers + 1) * shape.hidden_size)
        read = sum(kernel.count * kernel.size_bytes for kernel in kernels if kernel.kind == "product")
        assert read == pytest.approx(weights * shape.dtype_bytes, rel=0.01)

    @pytest.mark.parametrize("name", MODEL_NAMES)
    def test_attention_reads_the_cache_once(self, name: str) -> None:
        shape = MODELS[name]
        read = [sum(k.count * k.size_bytes for k in decode_attention(shape, 8, tokens)) for tokens in (8_000, 80_000)]
        assert read[1] - read[0] == 72_000 * shape.kv_bytes_per_token

    @pytest.mark.parametrize("devices", [2, 4, 8])
    def test_devices_share_work_and_exchange_sums(self, devices: int) -> None:
        forwards = DecoderForwards(MODELS["llama-3.1-8b"])
        one, each = (forwards.decode(64, 64_000, n) for n in (1, devices))

        def flops(kernels: tuple[Kernel, ...]) -> float:
            return sum(kernel.count * kernel.flops for kernel in kernels)

        assert devices * flops(tuple(each)) == pytest.approx(flops(tuple(one)), rel=0.01)
        assert not any(kernel.kind == "reduce" for kernel in one)
        assert sum(k.count for k in each if k.kind == "reduce") == 2 * 32 + 1


class TestPlans:
    def test_a_recorded_product_is_tiled_as_it_was(self) -> None:
        entries = rules().plans["hopper", 132]
        assert {(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)} <= set(entries)
        for (columns, depth), known in list(entries.items())[:4]:
            for rows, plan in known:
                found = plan_of(product("p", 1, rows, columns, depth, 2), H200, rules().plans, lambda kernel, plan: 1.0)
                assert found is plan

    def test_a_part_of_a_device_runs_the_whole_s_kernels(self) -> None:
        kernel = product("p", 1, 64, 5120, 3072, 2)  # not among the recorded
        costs: list[int] = []

        def cost(kernel: Kernel, plan: object) -> float:
            costs.append(1)
            return 1.0

        part = H200.cut(64)
        assert plan_of(kernel, part, rules().plans, cost) == plan_of(kernel, H200, rules().plans, cost)
        assert costs

    @given(st.integers(1, 9000), st.sampled_from([(2048, 2048), (28672, 4096), (5120, 3072), (1000, 2048)]))
    @settings(max_examples=50, deadline=None)
    def test_tiles_cover_the_product(self, rows: int, size: tuple[int, int]) -> None:
        kernel = product("p", 1, rows, *size, 2)
        for device in (H200, CATALOGUE["a100-80"]):
            plan = plan_of(kernel, device, rules().plans, lambda kernel, plan: plan.tiles * plan.columns)
            assert plan.tiles * plan.columns * plan.rows >= plan.shares * kernel.rows * kernel.columns
            assert 1 <= plan.blocks <= max(device.planned, plan.tiles)


class TestIdentity:
    @pytest.mark.parametrize("model", MODEL_NAMES)
    def test_the_same_device_gives_the_profile_itself(self, model: str) -> None:
        assert transferred(measured(model), H200) is measured(model)

    def test_a_device_that_is_as_fast_takes_as_long(self) -> None:
        # Only its host differs: all of the device's times stay as they were measured, bit for bit.
        found = transferred(measured(), other(host_speed=0.5))
        assert found.device == measured().device
        assert found.transfer is not None and found.transfer.spread["decode"] == 0.0

    def test_so_does_one_that_was_written_down_by_its_numbers(self) -> None:
        own = Hardware(
            sms=H200.sms,
            clock_mhz=H200.clock_mhz,
            matrix_tflops={"bf16": H200.matrix_tflops["bf16"]},
            vector_tflops={"fp32": H200.vector_tflops["fp32"]},
            memory_bytes=H200.memory_bytes,
            memory_gb_per_s=H200.memory_gb_per_s,
            pcie_gb_per_s=H200.pcie_gb_per_s,
        )
        assert transferred(measured(), own.device()) is measured()
        unlike = transferred(measured(), other(family="unknown", l2_bytes=1 << 20)).transfer
        assert unlike is not None and unlike.spread["decode"] > 0

    @pytest.mark.parametrize("name", ["h100-sxm", "l4", "b200"])
    def test_there_and_back_is_where_it_began(self, name: str) -> None:
        there = transferred(measured(), CATALOGUE[name])
        reported = CATALOGUE[name].reported[0]
        there = there.model_copy(update={"provenance": {"device": reported}, "transfer": None})
        assert decode_ns(transferred(there, H200)) == pytest.approx(decode_ns(measured()), rel=1e-9)


class TestLimits:
    """Devices on which only one thing counts."""

    @given(st.floats(0.25, 4))
    @settings(max_examples=10, deadline=None)
    def test_where_memory_is_all_times_go_with_the_bandwidth(self, factor: float) -> None:
        slow = other(memory_gb_per_s=4.8)  # a thousandth: nothing else counts
        ns = [
            rules().forward_ns(DecoderForwards(MODELS["llama-3.1-8b"]).decode(8, 8_000, 1), device, "bf16")
            for device in (slow, slow.model_copy(update={"memory_gb_per_s": 4.8 * factor}))
        ]
        assert ns[0] / ns[1] == pytest.approx(factor, rel=0.05)

    @given(st.floats(0.25, 4))
    @settings(max_examples=10, deadline=None)
    def test_where_arithmetic_is_all_times_go_with_the_rate(self, factor: float) -> None:
        slow = faster(CATALOGUE["a100-80"], 1e-3)
        ns = [
            rules().forward_ns(projections(MODELS["llama-3.1-8b"], 4096, 1), device, "bf16")
            for device in (slow, faster(slow, factor))
        ]
        assert ns[0] / ns[1] == pytest.approx(factor, rel=0.05)

    def test_where_launches_are_all_times_go_with_the_clock(self) -> None:
        tiny = projections(MODELS["tiny"], 1, 1)
        ns = [rules().forward_ns(tiny, other(clock_mhz=clock), "bf16") for clock in (1980.0, 990.0)]
        assert ns[1] / ns[0] == pytest.approx(2, rel=0.1)


class TestMonotony:
    """A better device is never slower."""

    @pytest.mark.parametrize("model", ["llama-3.2-1b", "llama-3.1-8b"])
    @pytest.mark.parametrize("better", [{"memory_gb_per_s": 6000.0}, {"clock_mhz": 2200.0}])
    def test_more_bandwidth_and_a_higher_clock(self, model: str, better: dict[str, float]) -> None:
        found = transferred(measured(model), other(**better))
        pairs = zip(decode_ns(found), decode_ns(measured(model)), strict=True)
        assert all(after <= before * (1 + 1e-9) for after, before in pairs)
        after, before = found.device.prefill, measured(model).device.prefill
        assert all(a <= b * (1 + 1e-9) for a, b in zip(after.ns, before.ns, strict=True))

    @pytest.mark.parametrize("factor", [0.25, 0.5, 2.0])
    def test_long_prompts_go_with_the_rate_of_the_matrix_units(self, factor: float) -> None:
        # Also where the tiles of the base were recorded.
        rates = {dtype: rate * factor for dtype, rate in H200.matrix_tflops.items()}
        found = transferred(measured(), Hardware(base="h200", matrix_tflops=rates).device())
        assert found.device.prefill.ns[-1] / measured().device.prefill.ns[-1] == pytest.approx(1 / factor, rel=0.15)
        assert found.device.prefill.pair_ns == pytest.approx(measured().device.prefill.pair_ns / factor)

    def test_more_nvlink(self) -> None:
        times = [
            decode_ns(transferred(measured("llama-3.2-1b"), other(nvlink_gb_per_s=link), 2))
            for link in (0.0, 1.0, 30.0, 64.0, 450.0, 900.0)
        ]
        for slower, faster in pairwise(times):
            assert all(after <= before for after, before in zip(faster, slower, strict=True))

    @pytest.mark.parametrize("model", ["llama-3.2-1b", "llama-3.1-8b"])
    def test_two_multiprocessors_more_than_the_source_s(self, model: str) -> None:
        # For them no product was recorded; what is wrong with the law's own tiles must not count as a difference.
        after, before = transferred(measured(model), H200.cut(134)), measured(model)
        pairs = [*zip(decode_ns(after), decode_ns(before), strict=True)]
        pairs += zip(after.device.prefill.ns, before.device.prefill.ns, strict=True)
        ratios = [a / b for a, b in pairs]
        assert min(ratios) > 0.9 and max(ratios) < 1.02

    @pytest.mark.parametrize("sms", [113, 115, 133])
    def test_an_odd_number_of_multiprocessors_has_no_wave_more(self, sms: int) -> None:
        own = {"family": "unknown", "whole_sms": None}
        less, more = (transferred(measured(), H200.cut(n).model_copy(update=own)) for n in (sms - 1, sms))
        assert all(a <= b * 1.01 for a, b in zip(more.device.prefill.ns, less.device.prefill.ns, strict=True))

    @pytest.mark.parametrize("model", ["llama-3.2-1b", "llama-3.1-8b"])
    @pytest.mark.parametrize("sms", [16, 32, 48, 64])
    def test_twice_the_multiprocessors(self, model: str, sms: int) -> None:
        # Not every single one more: the waves of a part may be more uneven than those of a smaller one.
        less, more = (transferred(measured(model), H200.cut(n)) for n in (sms, 2 * sms))
        assert all(after < before for after, before in zip(decode_ns(more), decode_ns(less), strict=True))
        after, before = more.device.prefill, less.device.prefill
        assert all(a < b for a, b in zip(after.ns, before.ns, strict=True))
        assert more.device.prefill.pair_ns < less.device.prefill.pair_ns

    @pytest.mark.parametrize("sms", [24, 66, 120])
    def test_a_part_is_slower_than_the_whole(self, sms: int) -> None:
        part = transferred(measured(), H200.cut(sms))
        assert all(a >= b for a, b in zip(decode_ns(part), decode_ns(measured()), strict=True))

    def test_a_part_loses_no_more_than_its_share(self) -> None:
        # Latencies and memory stay; what waves lose is less than a wave of the whole.
        part = transferred(measured(), H200.cut(66))
        ratios = [a / b for a, b in zip(decode_ns(part), decode_ns(measured()), strict=True)]
        assert max(ratios) < 2.2


class TestHost:
    def test_a_slower_host_takes_longer_for_host_work_alone(self) -> None:
        found = transferred(measured(), other(host_speed=0.5))
        for name, loop in found.loops.items():
            before = measured().loops[name]
            assert loop.wake_up_ns == 2 * before.wake_up_ns
            assert loop.gap_ns == before.gap_ns
            assert loop.copy_in_device_ns == before.copy_in_device_ns
            for phase, fit in loop.phases.items():
                assert fit.mean_ns(7, 5, 3, 11) == pytest.approx(2 * before.phases[phase].mean_ns(7, 5, 3, 11))
                assert fit.ratios == before.phases[phase].ratios

    @pytest.mark.parametrize(("cores", "factor"), [(0.25, 4), (0.5, 2), (1, 1), (14, 1)])
    def test_loops_share_cores(self, cores: float, factor: float) -> None:
        assert host_factor(other(host_cores=cores)) == factor

    def test_speeds_multiply(self) -> None:
        assert host_factor(other(host_cores=0.5, host_speed=4.0)) == 0.5


class TestParallel:
    def test_two_devices_are_faster_but_less_than_twice(self) -> None:
        found = transferred(measured(), H200, 2)
        ratios = [a / b for a, b in zip(decode_ns(found), decode_ns(measured()), strict=True)]
        assert min(ratios) > 0.5 and max(ratios) < 1.05

    def test_a_slow_link_eats_the_gain(self) -> None:
        linked = transferred(measured(), H200, 2)
        unlinked = transferred(measured(), other(nvlink_gb_per_s=0.0), 2)
        assert all(a < b for a, b in zip(decode_ns(linked), decode_ns(unlinked), strict=True))

    def test_each_layer_has_more_launches(self) -> None:
        found = transferred(measured(), H200, 4)
        assert found.kernels.per_layer > measured().kernels.per_layer


class TestMarks:
    def test_the_transfer_is_told(self) -> None:
        found = transferred(measured(), CATALOGUE["a100-80"], 2)
        assert found.transfer is not None
        assert found.transfer.sentence == "transferred from NVIDIA H200 SXM to 2 x NVIDIA A100 SXM4 80 GB"
        assert set(found.transfer.spread) == PARTS
        assert found.device_memory_bytes == CATALOGUE["a100-80"].memory_bytes

    def test_a_transferred_profile_is_a_profile(self) -> None:
        found = transferred(measured(), Hardware(base="l40s", host_speed=0.7).device())
        assert Profile.model_validate_json(found.model_dump_json()) == found

    def test_doubt_grows_with_the_distance(self) -> None:
        def doubt(device: Device) -> float:
            transfer = transferred(measured(), device).transfer
            assert transfer is not None
            return transfer.spread["decode"]

        near, far = doubt(H200.cut(100)), doubt(H200.cut(30))
        assert 0 < near < far
        assert doubt(CATALOGUE["l4"]) > doubt(CATALOGUE["a100-80"]) > doubt(CATALOGUE["h100-sxm"])
