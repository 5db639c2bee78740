"""A scenario is taken as it is meant or refused with a sentence that says where, what was found, and what would do."""

from __future__ import annotations

import json
import re
import string
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from batchsim import yaml_loader
from batchsim.errors import InputError
from batchsim.kinds import KINDS
from batchsim.model import MODELS
from batchsim.plan.spec import read as read_plan
from batchsim.refusal import Override
from batchsim.router import ROUTERS
from batchsim.scenario import Scenario, check_memory, check_requests, num_kv_blocks, parse, scenario_json_schema
from batchsim.schedules import SCHEDULES
from batchsim.sweep.run import read as read_sweep
from batchsim.tiles.scenario import load as load_tiles
from batchsim.workload import requests_of
from batchsim.workload_scenario import FixedWorkload

SCENARIOS = Path(__file__).parents[1] / "scenarios"
SMALLEST: dict[str, Any] = {
    "kind": "serving",
    "name": "smallest",
    "model": "tiny",
    "profile": "p",
    "workload": {"kind": "fixed", "num_prompts": 1, "input_len": 1, "output_len": 1},
}
RANDOM = {"kind": "random", "num_prompts": 1, "input_len": 1, "output_len": 1}
TRACE = {"kind": "trace", "path": "trace.csv"}


def text_of(**changes: Any) -> str:
    """The smallest scenario as YAML; a change to None removes a key, `workload__x` names one of the workload's."""
    data = {**SMALLEST, "workload": dict(SMALLEST["workload"])}
    for name, value in changes.items():
        *parents, key = name.split("__")
        place = data["workload"] if parents else data
        if value is None:
            del place[key]
        else:
            place[key] = value
    return yaml.safe_dump(data, sort_keys=False)


def refusal(text: str, *sets: str | Override) -> InputError:
    with pytest.raises(InputError) as caught:
        parse(text, "x.yaml", sets)
    return caught.value


def test_defaults() -> None:
    scenario = parse(text_of())
    assert scenario.model_dump(mode="json") == {
        **SMALLEST,
        "workload": {
            **SMALLEST["workload"], "request_rate": None, "burstiness": 1.0, "max_concurrency": None, "priorities": None
        },
        "tile_profile": None,
        "schedules": ["sync", "async"],
        "cuda_graphs": True,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 8192,
        "chunked_prefill": True,
        "scheduling_policy": "fcfs",
        "block_size": 16,
        "kv_cache_bytes": None,
        "gpu_memory_utilization": None,
        "preemption": "recompute",
        "prefix_caching": False,
        "replicas": 1,
        "router": "round_robin",
        "host_threads": 1,
        "host_speed": 1.0,
        "launch_queue_depth": 1024,
        "jitter": True,
        "seed": 0,
        "replication": 0,
        "replications": 1,
        "warm_up_s": 0.0,
        "slo": None,
        "level": "iteration",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("workload", "defaults"),
    [
        (RANDOM, {"request_rate": None, "burstiness": 1.0, "shared_prefix": None}),
        (TRACE, {"format": "auto", "rate_scale": 1.0, "start": 0, "limit": None, "no_output": "refuse"}),
    ],
    ids=["random", "trace"],
)
def test_defaults_of_other_workloads(workload: dict[str, Any], defaults: dict[str, Any]) -> None:
    scenario = parse(text_of(workload=workload))
    expected = {**workload, **defaults, "max_concurrency": None, "priorities": None}
    assert scenario.model_dump(mode="json")["workload"] == expected


@pytest.mark.parametrize("path", sorted(SCENARIOS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_scenarios_load_and_name_their_schema(path: Path) -> None:
    kind = yaml.safe_load(path.read_text())["kind"]
    if kind == "tiles":
        load_tiles(path)
    elif kind == "sweep":
        read_sweep(path, draws=0)
    elif kind == "plan":
        read_plan(yaml_loader.load(path), str(path))
    else:
        KINDS[kind].load(path, ())
    assert path.read_text().startswith("# yaml-language-server: $schema=scenario.schema.json\n")


def test_the_shipped_schema_is_current() -> None:
    assert json.loads((SCENARIOS / "scenario.schema.json").read_text()) == scenario_json_schema()


def test_every_key_is_described_in_the_schema() -> None:
    schema = scenario_json_schema()["$defs"]["Scenario"]
    for key in Scenario.model_fields:
        described = schema["properties"][key]
        assert described.get("description") or "$ref" in described
    assert schema["properties"]["model"]["enum"] == list(MODELS)
    assert schema["properties"]["schedules"]["items"]["enum"] == list(SCHEDULES)


COUNTS = st.integers(1, 10_000_000)
RATES = st.floats(0.001, 1e6)
ARRIVALS = {
    "request_rate": RATES
    | st.lists(st.fixed_dictionaries({"rate": RATES, "duration_s": RATES}), min_size=1, max_size=3)
    | st.fixed_dictionaries({"mean": RATES, "amplitude": st.floats(0, 0.999)}, optional={"peak_s": st.floats(0, 1e9)}),
}
PRIORITIES = st.lists(st.integers(-9, 9), min_size=1, max_size=4, unique=True).map(
    lambda found: [{"priority": priority, "share": 1.5} for priority in found]
)
LENGTHS = (
    COUNTS
    | st.fixed_dictionaries({"dist": st.just("lognorm"), "s": st.floats(0.1, 2), "scale": st.floats(1, 1e4)})
    | st.fixed_dictionaries({"values": st.lists(COUNTS, min_size=1, max_size=4)})
)
WORKLOADS = st.one_of(
    st.fixed_dictionaries(
        {"kind": st.just("fixed"), "num_prompts": COUNTS, "input_len": COUNTS, "output_len": COUNTS},
        optional={**ARRIVALS, "priorities": PRIORITIES},
    ),
    st.fixed_dictionaries(
        {"kind": st.just("random"), "num_prompts": COUNTS, "input_len": LENGTHS, "output_len": LENGTHS},
        optional={
            **ARRIVALS, "max_concurrency": COUNTS,
            "shared_prefix": st.fixed_dictionaries({"len": st.integers(16, 9999)}, optional={"count": COUNTS}),
        },
    ),
    st.fixed_dictionaries(
        {"kind": st.just("trace"), "path": st.just("a trace.csv")},
        optional={"format": st.sampled_from(["auto", "azure", "mooncake"]), "rate_scale": RATES, "limit": COUNTS},
    ),
)  # fmt: skip
SCENARIO_DATA = st.fixed_dictionaries(
    {
        "kind": st.just("serving"),
        # PyYAML's writer follows YAML 1.1 and leaves `0E0` unquoted, a number in 1.2: a letter goes before it.
        "name": st.text(max_size=199).filter(str.isprintable).map(lambda text: "n" + text),
        "model": st.sampled_from(list(MODELS)),
        "profile": st.just("p"),
        "workload": WORKLOADS,
        "max_num_seqs": st.integers(1, 8192),
    },
    optional={
        "schedules": st.lists(st.sampled_from(list(SCHEDULES)), min_size=1, unique=True),
        "cuda_graphs": st.booleans(),
        "max_num_batched_tokens": st.integers(8192, 10_000_000),
        "block_size": st.sampled_from([16, 32, 64, 65_536]),
        "host_speed": st.floats(0.001, 1000) | st.integers(1, 1000),
        "jitter": st.booleans(),
        "seed": st.integers(0, 2**63 - 1),
        "replication": st.integers(0, 2**30),
        "replications": st.integers(1, 10_000),
        "chunked_prefill": st.booleans(),
        "scheduling_policy": st.sampled_from(["fcfs", "priority"]),
        "gpu_memory_utilization": st.floats(0, 1, exclude_min=True),
        "preemption": st.sampled_from(["recompute", "none"]),
        "prefix_caching": st.booleans(),
        "router": st.sampled_from(ROUTERS),
        "warm_up_s": st.floats(0, 1e9),
        "slo": st.fixed_dictionaries({}, optional={"ttft_ms": RATES, "tpot_ms": RATES, "e2e_ms": RATES}),
        "level": st.sampled_from(["iteration", "operation"]),
    },
)


@settings(deadline=None)  # a distribution's first use imports scipy
@given(SCENARIO_DATA)
def test_a_scenario_dumps_to_json_that_loads_again(data: dict[str, Any]) -> None:
    scenario = Scenario.model_validate(data)
    assert parse(json.dumps(scenario.model_dump(mode="json"))) == scenario
    assert parse(yaml.safe_dump(data, allow_unicode=True)) == scenario


WRITTEN: list[dict[str, Any]] = [
    parse(text_of(workload=workload)).model_dump(mode="json") for workload in (SMALLEST["workload"], RANDOM, TRACE)
]
ALL_KEYS = [
    (i, path)
    for i, written in enumerate(WRITTEN)
    for path in [*((key,) for key in written), *(("workload", key) for key in written["workload"])]
]


@given(st.sampled_from(ALL_KEYS), st.data())
def test_a_typo_in_a_key_is_refused_with_the_key_that_was_meant(
    where: tuple[int, tuple[str, ...]], data: st.DataObject
) -> None:
    which, path = where
    *parents, key = path
    letter = data.draw(st.sampled_from(string.ascii_lowercase + "_"))
    at = data.draw(st.integers(0, len(key) - 1))
    typo = data.draw(
        st.sampled_from(
            [
                key[:at] + key[at + 1 :],
                key[:at] + letter + key[at:],
                key[:at] + letter + key[at + 1 :],
                key[:at] + key[at + 1 : at + 2] + key[at] + key[at + 2 :],
                key.replace("_", "-"),
                key.upper(),
            ]
        )
    )
    scenario = deepcopy(WRITTEN[which])
    place = scenario[parents[0]] if parents else scenario
    # `replicatio` plus one letter may be meant for either of two keys.
    if typo in place or (key == "replications" and re.fullmatch(r"replication[a-z_-]?", typo)):
        return
    place[typo] = place.pop(key)
    error = refusal(json.dumps(scenario))
    assert [(problem.key, problem.wanted) for problem in error.problems] == [
        (".".join((*parents, typo)), ".".join(path))
    ]


@pytest.mark.parametrize(
    ("changes", "key", "found", "wanted"),
    [
        ({"workload__num_prompts": 0}, "workload.num_prompts", "0", "an integer from 1 to 10000000"),
        ({"workload__input_len": -3}, "workload.input_len", "-3", "an integer from 1 to 10000000"),
        ({"workload__output_len": 1.5}, "workload.output_len", "1.5", "an integer from 1 to 10000000"),
        ({"workload__num_prompts": 1e3}, "workload.num_prompts", "1000.0", "an integer from 1 to 10000000"),
        ({"workload__num_prompts": True}, "workload.num_prompts", "true", "an integer from 1 to 10000000"),
        ({"workload__num_prompts": "8_192"}, "workload.num_prompts", "the string '8_192'", "an integer from"),
        ({"workload__num_prompts": None}, "workload.num_prompts", "nothing", "an integer from 1 to 10000000"),
        ({"workload__num_prompts": 10**30}, "workload.num_prompts", str(10**30), "an integer from 1 to 10000000"),
        ({"workload": 3}, "workload", "3", "a mapping with kind: fixed, random or trace"),
        ({"workload": []}, "workload", "an empty list", "a mapping with kind: fixed, random or trace"),
        ({"model": "llama-3.1-b8"}, "model", "the string 'llama-3.1-b8'", "tiny (the nearest: llama-3.1-8b)"),
        ({"model": ["tiny"]}, "model", "a list", "llama-3.2-1b, llama-3.2-3b, llama-3.1-8b or tiny"),
        ({"name": ""}, "name", "the string ''", "text of 1 to 200 characters"),
        ({"name": "x" * 201}, "name", "the string 'xxx", "text of 1 to 200 characters"),
        ({"name": "two\nlines"}, "name", "the string 'two\\nlines'", "printable text on one line"),
        ({"name": "\x1b[31m"}, "name", "the string '\\x1b[31m'", "printable text on one line"),
        ({"name": 3}, "name", "3", "text of 1 to 200 characters"),
        ({"schedules": []}, "schedules", "an empty list", "a list of one or more of sync, async"),
        ({"schedules": "sync"}, "schedules", "the string 'sync'", "a list of one or more of sync, async"),
        ({"schedules": ["snc"]}, "schedules.0", "the string 'snc'", "sync, async or tile (the nearest: sync)"),
        ({"schedules": ["sync", 1]}, "schedules.1", "1", "sync, async or tile"),
        ({"schedules": ["sync", "sync"]}, "schedules", "sync twice", "each schedule once"),
        ({"cuda_graphs": "no"}, "cuda_graphs", "the string 'no'", "true or false"),
        ({"jitter": 0}, "jitter", "0", "true or false"),
        ({"host_speed": float("inf")}, "host_speed", "inf", "a number from 0.001 to 1000"),
        ({"host_speed": float("nan")}, "host_speed", "nan", "a number from 0.001 to 1000"),
        ({"host_speed": 0}, "host_speed", "0", "a number from 0.001 to 1000"),
        ({"host_speed": True}, "host_speed", "true", "a number from 0.001 to 1000"),
        ({"host_speed": 10**39}, "host_speed", str(10**39), "a number from 0.001 to 1000"),
        ({"seed": -1}, "seed", "-1", "an integer from 0 to 9223372036854775807"),
        ({"block_size": 8}, "block_size", "8", "an integer from 16 to 65536"),
        ({"block_size": 24}, "block_size", "24", "a power of two of at least 16"),
        (
            {"kind": "trainin"},
            "kind",
            "the string 'trainin'",
            "serving, dynamic, training, tiles, sweep or plan (the nearest: training)",
        ),
        (
            {"max_num_seqs": 512, "max_num_batched_tokens": 511},
            "max_num_batched_tokens",
            "511, less than max_num_seqs = 512",
            "at least 512",
        ),
        ({"colour": 4}, "colour", "an unknown key", "kind, name, model"),
        ({"requests": 4}, "requests", "an unknown key", "workload.request_rate"),
        ({"num_prompts": 4}, "num_prompts", "a key of another place", "workload.num_prompts"),
        ({"workload__seed": 4}, "workload.seed", "a key of another place", "seed"),
        ({"request_rate": 4}, "request_rate", "a key of another place", "workload.request_rate"),
        ({"max_concurrency": 4}, "max_concurrency", "a key of another place", "workload.max_concurrency"),
        ({"shared_prefix": 4}, "shared_prefix", "a key of another place", "workload.shared_prefix"),
        ({"workload__shared_prefix": 4}, "workload.shared_prefix", "a key of another kind", "input_len or output_len"),
        ({"workload__kind": "poisson"}, "workload.kind", "the string 'poisson'", "fixed, random or trace"),
        ({"workload__kind": "trac"}, "workload.kind", "the string 'trac'", "trace (the nearest: trace)"),
        ({"workload__request_rate": 0}, "workload.request_rate", "0", "a number from 1e-06 to 1e+09"),
        ({"workload__request_rate": -1}, "workload.request_rate", "-1", "a number from 1e-06 to 1e+09"),
        ({"workload__request_rate": "5/s"}, "workload.request_rate", "the string '5/s'", "a list of pieces"),
        ({"workload__request_rate": float("inf")}, "workload.request_rate", "inf", "a number from 1e-06 to 1e+09"),
        ({"workload__max_concurrency": 0}, "workload.max_concurrency", "0", "an integer from 1 to 10000000"),
        ({"workload__burstiness": 2.0}, "workload.burstiness", "2 without request_rate", "request_rate beside it"),
        ({"chunked_prefill": 1}, "chunked_prefill", "1", "true or false"),
        ({"scheduling_policy": "lcfs"}, "scheduling_policy", "the string 'lcfs'", "fcfs or priority"),
        ({"preemption": "swap"}, "preemption", "the string 'swap'", "recompute or none"),
        ({"preemption": False}, "preemption", "false", "recompute or none"),
        ({"prefix_caching": "yes"}, "prefix_caching", "the string 'yes'", "true or false"),
        ({"kv_cache_bytes": 0}, "kv_cache_bytes", "0", "an integer from 1 to 1000000000000000"),
        ({"kv_cache_bytes": "4 GB"}, "kv_cache_bytes", "the string '4 GB'", "an integer from 1"),
        (
            {"kv_cache_bytes": 10**9, "gpu_memory_utilization": 0.9},
            "gpu_memory_utilization",
            "beside kv_cache_bytes",
            "one of the two",
        ),
        ({"replicas": 0}, "replicas", "0", "an integer from 1 to 1024"),
        (
            {"replicas": 2, "workload__max_concurrency": 4},
            "replicas",
            "2 with max_concurrency",
            "a workload without max_concurrency",
        ),
        ({"router": "random"}, "router", "the string 'random'", "round_robin, least_outstanding or prefix_aware"),
        ({"replications": 0}, "replications", "0", "an integer from 1 to 10000"),
        ({"warm_up_s": -1}, "warm_up_s", "-1", "a number from 0 to 1e+09"),
        ({"slo": 200}, "slo", "200", "a mapping with ttft_ms, tpot_ms, e2e_ms"),
        ({"slo": {"ttfb_ms": 200}}, "slo.ttfb_ms", "an unknown key", "slo.ttft_ms"),
        ({"level": "tile"}, "level", "the string 'tile'", "iteration or operation"),
    ],
)
def test_one_mistake_gets_one_sentence(changes: dict[str, Any], key: str, found: str, wanted: str) -> None:
    error = refusal(text_of(**changes))
    assert len(error.problems) == 1
    assert error.file == "x.yaml"
    assert error.key == key
    assert found in error.found
    assert wanted in error.wanted
    assert "\n" not in str(error)


def test_several_mistakes_get_a_line_each_with_its_place() -> None:
    error = refusal(text_of(workload__num_promts=3, workload__num_prompts=None, seed=-1, jitter="on"))
    assert str(error).splitlines() == [
        "x.yaml:9: workload.num_promts: found an unknown key, wanted workload.num_prompts",
        "x.yaml:10: seed: found -1, wanted an integer from 0 to 9223372036854775807",
        "x.yaml:11: jitter: found the string 'on', wanted true or false",
    ]


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("gpu_memory_utilization", 0, "a number above 0 and at most 1"),
        ("gpu_memory_utilization", 90, "a number above 0 and at most 1"),
        ("slo", {"ttft_ms": 0}, "a number above 0 and at most 1e+09"),
    ],
)
def test_bounds_that_are_not_reached_are_told_as_such(key: str, value: object, wanted: str) -> None:
    assert refusal(text_of(**{key: value})).wanted == wanted


def test_a_missing_union_names_all_that_would_do() -> None:
    error = refusal(text_of(workload={"kind": "random", "num_prompts": 1, "output_len": 1}))
    assert (error.key, error.found) == ("workload.input_len", "nothing")
    assert error.wanted == "a mapping with dist, a mapping with values or an integer from 1 to 10000000"


def test_a_misspelt_kind_is_told_as_such() -> None:
    workload = {"knd": "fixed", "num_prompts": 1, "input_len": 1, "output_len": 1}
    error = refusal(text_of(workload=workload))
    assert [(problem.key, problem.wanted) for problem in error.problems] == [("workload.knd", "workload.kind")]


def test_a_kind_of_another_shape_gets_one_sentence() -> None:
    workload = {"kind": "poisson", "request_rate": 4, "num_requests": 100}
    error = refusal(text_of(workload=workload))
    assert [problem.key for problem in error.problems] == ["workload.kind"]


def test_a_missing_key_is_placed_where_its_mapping_begins() -> None:
    assert str(refusal(text_of(workload__input_len=None))).startswith("x.yaml:5: workload.input_len: found nothing")


class TestSet:
    def test_replaces_and_adds(self) -> None:
        scenario = parse(text_of(), sets=["workload.num_prompts=64", "host_speed=1e-1", "schedules=[async]"])
        assert isinstance(scenario.workload, FixedWorkload)
        assert scenario.workload.num_prompts == 64
        assert scenario.host_speed == 0.1
        assert scenario.schedules == ("async",)

    def test_the_last_one_counts(self) -> None:
        assert parse(text_of(), sets=["seed=1", "seed=2"]).seed == 2

    def test_makes_the_mappings_on_its_way(self) -> None:
        sets = ["workload.kind=fixed", "workload.num_prompts=2", "workload.input_len=3", "workload.output_len=4"]
        workload = parse(text_of(workload=None), sets=sets).workload
        assert workload == FixedWorkload(kind="fixed", num_prompts=2, input_len=3, output_len=4)

    @settings(deadline=None)
    @given(SCENARIO_DATA)
    def test_equals_the_same_values_in_the_file(self, data: dict[str, Any]) -> None:
        flat = {key: value for key, value in data.items() if key != "workload"}
        flat |= {f"workload.{key}": value for key, value in data["workload"].items()}
        sets = [f"{key}={json.dumps(value)}" for key, value in flat.items()]
        assert parse(text_of(workload=None), sets=sets) == parse(text_of(**data))

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("seed", "--set: found the string 'seed', wanted PATH=VALUE"),
            ("=3", "--set: found the string '=3', wanted PATH=VALUE"),
            ("workload..x=3", "wanted PATH=VALUE"),
            ("seed=", "--set: seed: found null, wanted an integer"),
            ("seed=-1", "--set: seed: found -1, wanted an integer"),
            ("seed=[1", "--set seed: found a mistake in the YAML"),
            ("num_prompts=3", "--set: num_prompts: found a key of another place, wanted workload.num_prompts"),
            ("workload.num_promts=3", "--set: workload.num_promts: found an unknown key, wanted workload.num_prompts"),
            ("model.layers=3", "--set: model.layers: found the string 'tiny' at model, wanted a mapping there"),
            ("schedules.0=sync", "found a list at schedules"),
        ],
    )
    def test_is_blamed_for_its_own_mistakes(self, text: str, told: str) -> None:
        assert told in str(refusal(text_of(schedules=["sync"]), text))

    def test_other_options_are_named_too(self) -> None:
        error = refusal(text_of(), Override("--schedules", ("schedules",), ["turbo"]))
        assert str(error).startswith("--schedules: schedules.0: found the string 'turbo', wanted sync, async or tile")


class TestMemory:
    scenario = parse(
        text_of(
            model="llama-3.1-8b",
            max_num_seqs=64,
            workload={"kind": "fixed", "num_prompts": 100, "input_len": 100, "output_len": 27},
        )
    )
    model = MODELS["llama-3.1-8b"]
    # 100 + 27 + 1 tokens are exactly 8 blocks of 16.
    request = 128 * model.kv_bytes_per_token
    weights = model.parameters * model.dtype_bytes

    def test_what_fits_exactly_is_taken(self) -> None:
        check_memory(self.scenario, self.weights + 64 * self.request)

    def test_a_byte_less_is_refused_with_what_fits(self) -> None:
        with pytest.raises(InputError) as caught:
            check_memory(self.scenario, self.weights + 64 * self.request - 1)
        error = caught.value.within("x.yaml")
        assert str(error).startswith("x.yaml: max_num_seqs: found 64 requests at once: 16.1 GB of weights and 1.07 GB")
        assert "max_num_seqs of at most 63" in error.wanted

    def test_one_request_or_the_weights_alone_may_be_too_much(self) -> None:
        with pytest.raises(InputError, match=r"workload: found one request"):
            check_memory(self.scenario, self.weights + self.request - 1)
        with pytest.raises(InputError, match=r"model: found llama-3.1-8b"):
            check_memory(self.scenario, self.weights - 1)


class TestKvCache:
    model = MODELS["llama-3.1-8b"]
    block = 16 * model.kv_bytes_per_token
    device = model.weight_bytes + 1000 * block

    def scenario(self, **changes: Any) -> Scenario:
        workload = {"kind": "fixed", "num_prompts": 100, "request_rate": 5, "input_len": 100, "output_len": 27}
        return parse(text_of(**{"model": "llama-3.1-8b", "workload": workload, **changes}))

    def test_is_what_the_weights_leave(self) -> None:
        assert num_kv_blocks(self.scenario(), self.device + self.block - 1) == 1000

    def test_is_as_large_as_is_said(self) -> None:
        assert num_kv_blocks(self.scenario(kv_cache_bytes=10 * self.block), self.device) == 10
        share = (self.model.weight_bytes + 10.5 * self.block) / self.device
        assert num_kv_blocks(self.scenario(gpu_memory_utilization=share), self.device) == 10

    @pytest.mark.parametrize(
        ("changes", "key", "found"),
        [
            ({"kv_cache_bytes": 1000 * block + 1}, "kv_cache_bytes", f"{1000 * block + 1:,}"),
            ({"kv_cache_bytes": block - 1}, "kv_cache_bytes", "room for no block"),
            ({"gpu_memory_utilization": 0.1}, "gpu_memory_utilization", "room for no block"),
        ],
    )
    def test_has_to_fit_the_device(self, changes: dict[str, Any], key: str, found: str) -> None:
        with pytest.raises(InputError) as caught:
            num_kv_blocks(self.scenario(**changes), self.device)
        assert caught.value.key == key
        assert found in caught.value.found

    def test_requests_that_arrive_over_time_take_turns(self) -> None:
        check_memory(self.scenario(), self.model.weight_bytes + 8 * self.block)

    def test_holds_each_request_alone(self) -> None:
        # 100 + 27 + 1 tokens are exactly 8 blocks of 16.
        scenario = self.scenario()
        requests = requests_of(scenario.workload, seed=0, replication=0)
        check_requests(scenario, requests, 8)
        with pytest.raises(InputError, match=r"workload: found request 0 of 100 \+ 27 tokens, which needs 8 blocks"):
            check_requests(scenario, requests, 7)

    @pytest.mark.parametrize(("preemption", "enough"), [("recompute", 127), ("none", 100)])
    def test_an_unsplit_prompt_has_to_fit_a_batch(self, preemption: str, enough: int) -> None:
        def limited(tokens: int) -> Scenario:
            changes = {"max_num_seqs": 4, "max_num_batched_tokens": tokens, "preemption": preemption}
            return self.scenario(chunked_prefill=False, **changes)

        requests = requests_of(self.scenario().workload, seed=0, replication=0)
        check_requests(limited(enough), requests, 1000)
        with pytest.raises(InputError, match=rf"max_num_batched_tokens: found {enough - 1} .* at least {enough}"):
            check_requests(limited(enough - 1), requests, 1000)


def test_scenarios_are_frozen_and_hashable() -> None:
    scenario = parse(text_of())
    with pytest.raises(ValidationError):
        scenario.seed = 3  # type: ignore[misc]
    assert hash(scenario) == hash(parse(text_of()))
