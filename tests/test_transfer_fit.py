"""The fits of the law of transfer: they find what made their data, and the shipped law meets what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from statistics import median

import numpy as np
import pytest

from batchsim.hardware import CATALOGUE
from batchsim.hardware.kernels import product
from batchsim.hardware.law import Rules, View, rules
from batchsim.hardware.plans import read_plans
from batchsim.profile import load_profile
from calibration.hardware.fit import PROFILES, TIMINGS, Timings, errors
from calibration.hardware.fit_link import fit as fit_link
from calibration.hardware.fit_tiles import plan_by_name, products_text, tile_law, timed_plans

H200 = CATALOGUE["h200"]
PARTS = (48, 56, 80, 88, 112, 120)
NAME = "nvjet_sm90_tst_128x64_64x8_2x1_v_bz_TNT"


@cache
def timings() -> Timings:
    return Timings.read(TIMINGS)


@cache
def missed() -> dict[tuple[int, str, str], float]:
    """Log errors of the shipped law at forwards on parts of the device."""
    profiles = {name: load_profile(profile) for name, profile in PROFILES.items()}
    return errors(timings(), rules(), profiles, PARTS)


class TestFits:
    @pytest.mark.parametrize("tile_ns", [4_000, 12_000, 40_000])
    def test_a_tile_s_time_is_found_again(self, tile_ns: int) -> None:
        key = (8192, 4096, 64)
        plan = plan_by_name(key[0], key[2], NAME, [2, 32, 1])
        known = read_plans(products_text({key: replace(plan, tile_ns=tile_ns)}))
        kernel = product("p", 1, key[2], key[0], key[1], 2)
        timed = {
            key: [
                (sms, View(Rules(rules().law, known), H200.cut(sms), "bf16", 1, False).kernel_ns(kernel) / 1e3)
                for sms in (24, 40, 132)
            ]
        }
        (found,) = timed_plans({key: plan}, timed, rules().law).values()
        assert found.tile_ns == pytest.approx(tile_ns, rel=0.01)
        assert found.whole_ns == pytest.approx(timed[key][-1][1] * 1e3, rel=0.01)

    def test_a_kernel_s_name_tells_its_tiles(self) -> None:
        plan = plan_by_name(8192, 100, NAME, [2, 64, 1])
        assert (plan.columns, plan.rows, plan.tiles, plan.blocks, plan.cluster) == (128, 64, 128, 128, 2)

    def test_blocks_without_a_tile_are_none(self) -> None:
        assert plan_by_name(1216, 64, NAME, [2, 8, 1]).blocks == 10  # of 10 tiles

    def test_tiles_by_size_are_found_again(self) -> None:
        law = rules().law.model_copy(update={"matrix_efficiency": 0.7, "tile_ns": 2500.0})
        rate = H200.matrix_rate("bf16") * 1e3 / 132 * 0.7
        plans = {}
        for wide, high in ((64, 16), (128, 64), (256, 128), (128, 128)):
            name = NAME.replace("128x64", f"{wide}x{high}")
            plan = plan_by_name(8192, 256, name, [2, 66, 1])
            tile_ns = 2500 + 2 * wide * high * wide * 16 / rate
            plans[8192, wide * 16, 256] = replace(plan, tile_ns=tile_ns)
        found = tile_law(plans, law.model_copy(update={"matrix_efficiency": 1.0, "tile_ns": 1000.0}))
        assert found.matrix_efficiency == pytest.approx(0.7, rel=0.01)
        assert found.tile_ns == pytest.approx(2500, rel=0.02)

    def test_both_ways_to_sum_are_found_again(self) -> None:
        sizes = np.array([2.0**power for power in range(8, 27)])
        times = np.minimum(5000 + sizes / 100, 20_000 + sizes / 300)
        small, large = fit_link(sizes, times, 450.0)
        for way, latency_ns, rate in ((small, 5000, 100), (large, 20_000, 300)):
            assert way.latency_ns == pytest.approx(latency_ns, rel=0.02)
            assert 450 * way.efficiency == pytest.approx(rate, rel=0.02)


class TestShippedLaw:
    def test_products_are_those_that_were_recorded(self) -> None:
        recorded = rules().plans["hopper", 132]
        assert {(*size, rows) for size, entries in recorded.items() for rows, _ in entries} == set(timings().plans)

    @pytest.mark.parametrize("sms", PARTS)
    def test_forwards_on_parts_take_what_was_measured(self, sms: int) -> None:
        for kind, most in (("decode", 0.03), ("prefill", 0.06)):
            found = [abs(error) for (at, _, key), error in missed().items() if at == sms and f"/{kind}/" in key]
            assert len(found) >= 10
            assert median(found) < most

    def test_spreads_cover_the_errors(self) -> None:
        # About two thirds of the errors stay within one standard deviation, nearly all within three.
        for kind in ("decode", "prefill"):
            base, more = rules().law.spread["part"][kind]
            scaled = [
                abs(error) / float(np.hypot(base, more * np.log2(132 / sms)))
                for (sms, _, key), error in missed().items()
                if f"/{kind}/" in key
            ]
            assert np.mean([each < 1 for each in scaled]) > 0.55
            assert np.mean([each < 3 for each in scaled]) > 0.97

    def test_sums_over_a_pair_take_what_was_measured(self) -> None:
        path = TIMINGS.parents[1] / "validation" / "hardware" / "link" / "h200-pair.json"
        law = rules().law
        for entry in json.loads(path.read_text(encoding="utf-8"))["all_reduce"]:
            ns = min(way.latency_ns + entry["bytes"] / (450 * way.efficiency) for way in law.link)
            assert ns / entry["marginal_us"] / 1e3 == pytest.approx(1, abs=0.3)
