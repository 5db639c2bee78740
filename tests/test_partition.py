"""Parts of a device: which there are, what a scenario may ask for, and on a GPU that kernels stay on theirs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchsim.errors import InputError
from batchsim.hardware import CATALOGUE, Hardware
from calibration.executor.partition import (
    count_multiprocessors,
    limited_to,
    nearest,
    part_of,
    smallest_part,
    stream_like_current,
)
from calibration.validate import execute, part_at_hand
from tests.profiles import scenario, small_profile

H200 = CATALOGUE["h200"]


@pytest.mark.parametrize("key", ["replicas", "tensor_parallel"])
def test_what_takes_several_devices_is_not_executed_on_one(key: str) -> None:
    with pytest.raises(InputError) as refused:
        execute(scenario(**{key: 2}), small_profile(), "cpu")
    assert refused.value.key == key


class TestPartOf:
    @given(sms=st.integers(1, 400))
    def test_fewer_multiprocessors_of_the_same_device_are_a_part(self, sms: int) -> None:
        wanted = Hardware(base="h200", sms=sms).device()
        if sms > H200.sms:
            with pytest.raises(InputError, match="at most 132"):
                part_of(wanted, H200, H200.sms)
        else:
            assert part_of(wanted, H200, H200.sms) == (None if sms == H200.sms else sms)

    @given(cores=st.floats(0.5, 64), speed=st.floats(0.1, 4), price=st.floats(0, 20))
    def test_host_and_price_are_no_matter_of_the_device(self, cores: float, speed: float, price: float) -> None:
        hardware = Hardware(base="h200", sms=40, host_cores=cores, host_speed=speed, price_per_hour=price)
        assert part_of(hardware.device(), H200, H200.sms) == 40

    @pytest.mark.parametrize("key", ["clock_mhz", "memory_gb_per_s", "memory_bytes", "l2_bytes", "pcie_gb_per_s"])
    def test_what_a_part_cannot_change_is_refused_by_name(self, key: str) -> None:
        changed = Hardware.model_validate({"base": "h200", key: getattr(H200, key) + 1}).device()
        with pytest.raises(InputError) as refused:
            part_of(changed, H200, H200.sms)
        assert refused.value.key == f"hardware.{key}"

    @pytest.mark.parametrize("name", [name for name in CATALOGUE if name != "h200"])
    def test_no_other_device_is_a_part_of_this_one(self, name: str) -> None:
        with pytest.raises(InputError, match="wanted"):
            part_of(CATALOGUE[name], H200, H200.sms)

    def test_a_device_that_the_catalogue_does_not_know_has_no_parts(self) -> None:
        with pytest.raises(InputError, match="knows nothing"):
            part_of(H200, None, 132)


class TestAtHand:
    def test_without_hardware_there_is_nothing_to_cut(self) -> None:
        assert part_at_hand(scenario(), "cpu") is None

    def test_a_cpu_has_no_parts(self) -> None:
        with pytest.raises(InputError, match="only a GPU's parts"):
            part_at_hand(scenario(hardware={"base": "h200", "sms": 40}), "cpu")


class TestNearest:
    @given(sizes=st.sets(st.integers(1, 132)), sms=st.integers(1, 132))
    def test_names_the_sizes_next_to_what_was_asked_for(self, sizes: set[int], sms: int) -> None:
        told = [] if (text := nearest(sizes, sms)) == "none" else [int(word) for word in text.split(" or ")]
        assert set(told) <= sizes - {sms}
        for size in sizes - {sms}:
            side = [found for found in told if (found < sms) == (size < sms)]
            assert len(side) == 1 and abs(side[0] - sms) <= abs(size - sms)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnDevice:
    def test_streams_and_graphs_stay_on_the_part(self) -> None:
        whole, device = count_multiprocessors(), torch.device("cuda", torch.cuda.current_device())
        sms = smallest_part(whole // 2)
        with limited_to(sms) as found:
            assert found == sms
            beside = stream_like_current(device)
        assert beside is not None
        with torch.cuda.stream(beside):
            assert count_multiprocessors() == sms
        assert stream_like_current(device) is None
        assert count_multiprocessors() == whole

    def test_a_size_between_two_cuts_is_refused_with_both(self) -> None:
        above = smallest_part(33)
        with pytest.raises(InputError, match=rf"found {above - 1}, wanted \d+ or {above}"), limited_to(above - 1):
            pass
