"""The catalogue of devices, what a scenario may write of its hardware, and what a wrong line gets told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from batchsim.batching.continuous import kv_blocks
from batchsim.cli import app
from batchsim.dynamic_scenario import DynamicScenario
from batchsim.errors import InputError
from batchsim.hardware import CATALOGUE, Device, device_of
from batchsim.hardware.device import Hardware
from batchsim.kinds import KINDS
from batchsim.memory import peak_bytes
from batchsim.memory.overheads import CPU
from batchsim.model import MODELS
from batchsim.profile import Profile, load_profile
from batchsim.scenario import Scenario, num_kv_blocks, parse
from tests.profiles import scenario as small_scenario
from tests.profiles import small_profile

NAMES = ("h200", "h100-sxm", "h100-pcie", "a100-80", "a100-40", "l40s", "l4", "v100", "b200")
TEXT = """
kind: serving
name: a chat service
model: llama-3.1-8b
profile: h200-llama-3.1-8b
workload: {kind: fixed, num_prompts: 8, input_len: 64, output_len: 16}
"""
OWN = """{sms: 96, clock_mhz: 1500, matrix_tflops: {bf16: 400}, vector_tflops: {fp32: 30}, memory_bytes: 64000000000,
 memory_gb_per_s: 1600, pcie_gb_per_s: 32}"""


def asked(hardware: str, *sets: str) -> Scenario:
    return parse(f"{TEXT}hardware: {hardware}\n", "x.yaml", sets)


def device(hardware: str) -> Device:
    found = asked(hardware).hardware
    assert found is not None
    return found.device()


class TestCatalogue:
    def test_holds_the_devices_that_people_rent(self) -> None:
        assert tuple(CATALOGUE) == NAMES

    @pytest.mark.parametrize("name", NAMES)
    def test_an_entry_names_its_sources(self, name: str) -> None:
        entry = CATALOGUE[name]
        assert "data sheet" in entry.source
        assert "whitepaper" in entry.source or name == "b200"
        assert entry.price_per_hour is None or "price: " in entry.source

    @pytest.mark.parametrize("name", NAMES)
    def test_rates_are_what_the_multiprocessors_can_do_at_the_boost_clock(self, name: str) -> None:
        # A multiprocessor's matrix units do a power of two of multiply-adds a clock; data sheets round.
        entry = CATALOGUE[name]
        per_clock = entry.matrix_rate("fp16") * 1e12 / (entry.sms * entry.clock_mhz * 1e6) / 2
        nearest = min((256, 512, 1024, 2048, 4096), key=lambda power: abs(per_clock / power - 1))
        assert per_clock == pytest.approx(nearest, rel=0.1)
        vector = entry.vector_rate() * 1e12 / (entry.sms * entry.clock_mhz * 1e6) / 2
        assert min(abs(vector / lanes - 1) for lanes in (64, 128)) < 0.03

    def test_a_profile_tells_its_device(self) -> None:
        assert device_of(load_profile("h200-llama-3.1-8b").provenance) is CATALOGUE["h200"]
        assert device_of({"device": "cpu"}) is None
        assert device_of({}) is None

    def test_a_profile_of_some_multiprocessors_is_of_a_smaller_device(self) -> None:
        part = device_of({"device": "NVIDIA H200", "multiprocessors": 66})
        assert part is not None
        assert part.matrix_rate("bf16") == pytest.approx(CATALOGUE["h200"].matrix_rate("bf16") / 2)
        assert part.memory_gb_per_s == CATALOGUE["h200"].memory_gb_per_s

    def test_the_command_lists_it(self) -> None:
        told = CliRunner().invoke(app, ["hardware"])
        assert told.exit_code == 0
        assert all(name in told.stdout for name in NAMES)
        listed = json.loads(CliRunner().invoke(app, ["hardware", "--json"]).stdout)
        assert {name: entry["sms"] for name, entry in listed.items()} == {n: d.sms for n, d in CATALOGUE.items()}


class TestScenario:
    def test_absent_keys_leave_a_scenario_as_it_was(self) -> None:
        scenario = parse(TEXT)
        assert scenario.hardware is None and scenario.tensor_parallel == 1
        assert not {"hardware", "tensor_parallel"} & set(scenario.model_dump(mode="json"))

    @pytest.mark.parametrize("hardware", ["h100-sxm", "{base: h200, sms: 66}", OWN])
    def test_what_was_written_is_read_again(self, hardware: str) -> None:
        scenario = asked(hardware, "tensor_parallel=2")
        again = Scenario.model_validate(json.loads(json.dumps(scenario.model_dump(mode="json"))))
        assert again == scenario
        assert again.hardware is not None and scenario.hardware is not None
        assert again.hardware.device() == scenario.hardware.device()

    def test_a_name_stays_a_name(self) -> None:
        assert asked("l4").model_dump(mode="json")["hardware"] == "l4"

    def test_a_name_is_the_catalogue_s_device(self) -> None:
        assert device("a100-80") is CATALOGUE["a100-80"]

    def test_given_values_replace_the_base_s(self) -> None:
        found, base = device("{base: h200, memory_gb_per_s: 4000, price_per_hour: 3}"), CATALOGUE["h200"]
        assert (found.memory_gb_per_s, found.price_per_hour) == (4000, 3)
        assert found.matrix_tflops == base.matrix_tflops

    def test_fewer_multiprocessors_compute_less(self) -> None:
        found, base = device("{base: h200, sms: 33, clock_mhz: 990}"), CATALOGUE["h200"]
        assert found.matrix_rate("bf16") == pytest.approx(base.matrix_rate("bf16") / 8)
        assert device("{base: h200, sms: 33, matrix_tflops: {bf16: 300}}").matrix_rate("bf16") == 300

    def test_a_device_of_one_s_own_needs_no_base(self) -> None:
        found = device(OWN)
        assert (found.sms, found.price_per_hour) == (96, None)

    @pytest.mark.parametrize(
        ("hardware", "told"),
        [
            ("h300", "x.yaml:7: hardware: found the string 'h300', wanted h200, "),
            ("h300", "(the nearest: h200)"),
            ("{base: h300}", "hardware.base: found the string 'h300'"),
            ("{base: h200, sm: 66}", "hardware.sm: found an unknown key, wanted hardware.sms"),
            ("{base: h200, sms: 0}", "hardware.sms: found 0, wanted an integer from 1 to 10000"),
            ("{base: h200, matrix_tflops: {bf17: 1}}", "found the string 'bf17', wanted bf16, "),
            ("{base: h200, memory_gb_per_s: .nan}", "hardware.memory_gb_per_s: found nan, wanted a number above 0"),
            ("{sms: 66}", "hardware.clock_mhz: found nothing, wanted its value, or a base from the catalogue"),
            ("7", "hardware: found 7, wanted h200, "),
        ],
    )
    def test_a_wrong_line_is_told_apart(self, hardware: str, told: str) -> None:
        with pytest.raises(InputError) as caught:
            asked(hardware)
        assert told in str(caught.value)

    @pytest.mark.parametrize("devices", [3, 16])
    def test_devices_divide_heads(self, devices: int) -> None:
        with pytest.raises(InputError, match=f"tensor_parallel: found {devices}, which does not divide the "):
            asked("h200", f"tensor_parallel={devices}")

    def test_a_table_has_no_hardware(self) -> None:
        table = {"kind": "table", "batch_ms": {"1": 4.2}}
        workload = {"kind": "fixed", "num_prompts": 4, "input_len": 1}
        with pytest.raises(ValueError, match="hardware beside costs"):
            DynamicScenario.model_validate(
                {"kind": "dynamic", "name": "t", "costs": table, "hardware": "l4", "workload": workload}
            )


class TestMemory:
    """What each of the devices holds that share a model."""

    @pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.1-8b"])
    @pytest.mark.parametrize("devices", [2, 4, 8])
    def test_shares_add_up_to_the_model(self, name: str, devices: int) -> None:
        whole, share = MODELS[name], MODELS[name].shard(devices)
        assert devices * share.kv_bytes_per_token == whole.kv_bytes_per_token
        # Each device has the embedding and the norms whole.
        both = whole.vocab_size * whole.hidden_size + (2 * whole.num_layers + 1) * whole.hidden_size
        assert devices * (share.parameters - both) == whole.parameters - both

    def test_one_device_holds_all(self) -> None:
        assert MODELS["llama-3.1-8b"].shard(1) == MODELS["llama-3.1-8b"]

    def test_a_replica_has_more_blocks_on_more_devices(self) -> None:
        one, two = (num_kv_blocks(asked("l4", f"tensor_parallel={n}"), 24 * 10**9) for n in (1, 2))
        # Half the weights leave more room, and a block takes half of it.
        assert two > 3 * one

    def test_a_model_that_one_device_cannot_hold_fits_two(self) -> None:
        with pytest.raises(InputError, match=r"model: found llama-3\.1-8b with 16\.1 GB of weights"):
            num_kv_blocks(asked("v100"), 12 * 10**9)
        assert num_kv_blocks(asked("v100", "tensor_parallel=2"), 12 * 10**9) > kv_blocks(80, 16)

    def test_the_breakdown_is_of_one_device(self) -> None:
        one, two = (peak_bytes(asked("h200", f"tensor_parallel={n}"), 80 * 10**9, CPU) for n in (1, 2))
        assert 0.4 * one < two < 0.7 * one


class TestKinds:
    def profile_of(self, scenario: Any, monkeypatch: pytest.MonkeyPatch, profile: Profile) -> Any:
        monkeypatch.setattr("batchsim.profile.load_profile", lambda name, base: profile)
        return KINDS[scenario.kind].costs(scenario, Path())

    def test_without_hardware_the_profile_is_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        profile = small_profile(provenance={"device": "NVIDIA H200"})
        assert self.profile_of(small_scenario(), monkeypatch, profile) is profile

    def test_with_hardware_it_is_transferred_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        profile = small_profile(provenance={"device": "NVIDIA H200"})
        scenario = small_scenario(hardware=Hardware(base="a100-80"))
        found = self.profile_of(scenario, monkeypatch, profile)
        assert found.transfer.target == "NVIDIA A100 SXM4 80 GB"
        assert self.profile_of(scenario, monkeypatch, profile) is found
        other = small_scenario(hardware=Hardware(base="a100-40"))
        assert self.profile_of(other, monkeypatch, profile) is not found

    def test_the_profile_s_own_device_changes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        profile = load_profile("h200-llama-3.2-1b")
        assert self.profile_of(small_scenario(hardware=Hardware(base="h200")), monkeypatch, profile) is profile

    @pytest.mark.parametrize("changes", [{"provenance": {"device": "cpu"}}, {"overlaps": False}])
    def test_a_profile_of_no_device_is_refused(self, changes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        profile = small_profile(**{"provenance": {"device": "NVIDIA H200"}} | changes)
        scenario = small_scenario(hardware=Hardware(base="l4"))
        with pytest.raises(InputError, match=r"hardware: found small, measured on .*, wanted a profile of a device"):
            self.profile_of(scenario, monkeypatch, profile)

    def test_a_service_is_transferred_too(self) -> None:
        scenario = DynamicScenario.model_validate(
            {
                "kind": "dynamic", "name": "t", "model": "bert-base", "profile": "h200-bert-base", "hardware": "l4",
                "workload": {"kind": "fixed", "num_prompts": 4, "input_len": 64},
            }
        )  # fmt: skip
        found: Any = KINDS["dynamic"].costs(scenario, Path())
        measured = load_profile("h200-bert-base")
        for after, before in zip(found.device.decode, measured.device.decode, strict=True):
            assert all(a > b for a, b in zip(after.ns, before.ns, strict=True))

    def test_results_are_marked(self) -> None:
        profile = small_profile(provenance={"device": "NVIDIA H200"})
        scenario = small_scenario(hardware=Hardware(base="l4"))
        from batchsim.hardware.transfer import for_scenario

        run = KINDS["serving"].simulate(scenario, for_scenario(profile, scenario))
        assert run.provenance["transfer"]["target"] == "NVIDIA L4"
        assert run.provenance["device"] == "NVIDIA H200"
        for name, result in run.results.items():
            assert f"{name}: transferred from NVIDIA H200 SXM to NVIDIA L4" in result.warnings
        plain = KINDS["serving"].simulate(small_scenario(), profile)
        assert "transfer" not in plain.provenance
        assert not any(result.warnings for result in plain.results.values())

    @pytest.mark.parametrize(("hardware", "known"), [({"host_speed": 0.5}, True), ({"sms": 66}, False)])
    def test_a_tile_profile_is_of_its_device_whatever_the_host(self, hardware: dict[str, Any], known: bool) -> None:
        from batchsim.engine import tile_level_of
        from batchsim.hardware.transfer import for_scenario

        scenario = small_scenario(model="llama-3.1-8b", schedules=("tile",), hardware=Hardware(base="h200", **hardware))
        profile = for_scenario(load_profile("h200-llama-3.1-8b"), scenario)
        assert (tile_level_of(scenario, profile) is not None) is known
