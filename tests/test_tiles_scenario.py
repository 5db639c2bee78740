"""A scenario of tiles becomes the chains that it means, or is refused with the key that is wrong."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from batchsim.errors import InputError
from batchsim.scenario import parse as parse_serving
from batchsim.scenario import scenario_json_schema
from batchsim.tiles import shapes
from batchsim.tiles.cases import Case, cases
from batchsim.tiles.graph import Chain, Dependence, Index, Interval, Region, whole
from batchsim.tiles.models import CONVOLUTIONS, DECODERS
from batchsim.tiles.policy import policies
from batchsim.tiles.scenario import TilesScenario, load, parse
from batchsim.tiles.shapes import Tiling
from tests.tile_profiles import tile_profile

SCENARIOS = Path(__file__).parents[1] / "scenarios"
MLP = {"kind": "mlp", "model": "gpt3", "m": 512, "tensor_parallel": 8}
PAIR: dict[str, Any] = {
    "kind": "custom",
    "kernels": [
        {"name": "a", "rows": 512, "cols": 512, "tile": [128, 128], "k": 1024, "tile_us": 10},
        {"name": "b", "rows": 512, "cols": 256, "tile": [128, 64], "k": 512, "cost": "gemm 128x128x64"},
    ],
    "dependences": [{"kind": "row", "producer": "a", "consumer": "b"}],
}


def text_of(chain: Any) -> str:
    return yaml.safe_dump({"kind": "tiles", "name": "n", "profile": "p", "chain": chain}, sort_keys=False)


def read(chain: Any) -> list[Case]:
    return cases(parse(text_of(chain)), tile_profile())


def chain_of(chain: Any) -> Chain:
    (case,) = read(chain)
    return case.candidates[0].chain


def with_edge(**edge: Any) -> dict[str, Any]:
    return {**PAIR, "dependences": [{"producer": "a", "consumer": "b", **edge}]}


def refusal(chain: Any, *sets: str) -> InputError:
    with pytest.raises(InputError) as caught:
        cases(parse(text_of(chain), "x.yaml", sets), tile_profile())
    return caught.value


class TestNamedShapes:
    def test_the_gpt3_mlp_is_divided_among_its_devices(self) -> None:
        up, down = chain_of(MLP).kernels
        assert (up.rows, up.cols, down.rows, down.cols) == (512, 6144, 512, 12288)
        assert (up.steps.start, down.steps.start) == (12288 // 64, 6144 // 64)

    def test_a_list_makes_a_case_of_each_size(self) -> None:
        found = read({**MLP, "m": [128, 256]})
        assert [case.candidates[0].chain.kernels[0].rows for case in found] == [128, 256]
        assert [case.name for case in found] == ["gpt3 mlp, tp 8, m = 128", "gpt3 mlp, tp 8, m = 256"]
        assert {case.layers for case in found} == {96}

    def test_a_list_of_chains_keeps_its_order(self) -> None:
        assert [
            case.layers for case in read([MLP, {"kind": "conv", "model": "vgg19", "images": 1, "channels": 64}])
        ] == [
            96,
            1,
        ]

    def test_without_tiles_all_of_the_profile_are_tried(self) -> None:
        (case,) = read(MLP)
        assert [candidate.tiling for candidate in case.candidates] == [
            "128x256x64", "128x256x64 + 128x128x64", "128x128x64 + 128x256x64", "128x128x64",
        ]  # fmt: skip

    def test_a_tile_takes_what_the_profile_knows_about_it(self) -> None:
        tile: dict[str, dict[str, Any]] = {"conv": {"rows": 128, "cols": 64}}
        kernel = chain_of({"kind": "conv", "model": "resnet38", "images": 1, "channels": 64, "tile": tile}).kernels[0]
        assert (kernel.cost, kernel.occupancy) == ("conv 128x64x64", 2)
        tile["conv"] |= {"occupancy": 1, "slices": 3, "cost": "gemm 128x128x64"}
        kernel = chain_of({"kind": "conv", "model": "resnet38", "images": 1, "channels": 64, "tile": tile}).kernels[0]
        assert (kernel.cost, kernel.occupancy, kernel.slices) == ("gemm 128x128x64", 1, 3)

    def test_gate_and_up_may_stand_apart_and_be_rounded_up(self) -> None:
        llama = {"kind": "gated_mlp", "model": "llama-65b", "m": 256, "tensor_parallel": 8}
        assert chain_of(llama).kernels[0].cols == 22016 // 8
        apart = chain_of({**llama, "halves": "apart", "inner": 2816})
        assert apart.kernels[0].cols == 2 * 2816
        assert len(apart.dependences[0].regions) == 2

    def test_attention_divides_its_heads(self) -> None:
        qkv, core, output = chain_of(
            {"kind": "attention", "model": "llama-3.1-8b", "m": 256, "tensor_parallel": 4}
        ).kernels
        assert (qkv.cols, core.cols, output.cols) == ((8 + 2 * 2) * 128, 8 * 128, 4096)

    @pytest.mark.parametrize("model", CONVOLUTIONS)
    def test_each_stage_of_a_network_is_a_case(self, model: str) -> None:
        found = read({"kind": "conv", "model": model, "images": [1, 4]})
        stages = [stage for stage in CONVOLUTIONS[model] for _ in range(2)]
        for case, stage, images in zip(found, stages, [1, 4] * 4, strict=True):
            kernels = case.candidates[0].chain.kernels
            assert len(kernels) == stage.convs
            assert (kernels[0].rows, kernels[0].cols) == (images * stage.height * stage.width, stage.channels)
            assert case.layers == stage.layers

    def test_published_sizes(self) -> None:
        gpt3, llama = DECODERS["gpt3"], DECODERS["llama-65b"]
        assert (gpt3.layers, gpt3.hidden, gpt3.inner, gpt3.heads * gpt3.head_dim) == (96, 12288, 49152, 12288)
        assert (llama.layers, llama.hidden, llama.inner, llama.heads * llama.head_dim) == (80, 8192, 22016, 8192)
        assert [stage.layers for stage in CONVOLUTIONS["resnet38"]] == [3, 4, 6, 3]
        assert [stage.convs for stage in CONVOLUTIONS["vgg19"]] == [2, 2, 4, 4]


class TestCustomChains:
    def test_a_matrix_product_reads_as_the_named_one_does(self) -> None:
        first, second = Tiling(128, 128), Tiling(128, 64, slices=2)
        named = shapes.mlp(512, 256, 512, first, second)
        kernels = [PAIR["kernels"][0], {**PAIR["kernels"][1], "slices": 2}]
        assert chain_of({**PAIR, "kernels": kernels}).dependences == named.dependences

    def test_a_tile_given_by_its_time_takes_it(self) -> None:
        (case,) = read(PAIR)
        kernel = case.candidates[0].chain.kernels[0]
        assert case.costs[kernel.cost].step_ns * kernel.steps.start == pytest.approx(10_000)

    def test_a_convolution_reads_its_halo(self) -> None:
        (region,) = chain_of(with_edge(kind="conv3x3", width=16)).dependences[0].regions
        assert region.rows == Interval(Index(-17, row=128), Index(145, row=128))
        assert region.cols == whole(512)

    def test_strided_parts_are_read_at_the_tiles_own_columns(self) -> None:
        chain = chain_of(with_edge(kind="strided", parts=2))
        spans = chain.spans(chain.dependences[0], next(t for t in chain.kernels[1] if t.col == 1))
        assert [cols for _, cols in spans] == [(64, 128), (320, 384)]
        everything = chain_of(with_edge(kind="strided", parts=2, read="all"))
        assert [cols for _, cols in everything.spans(everything.dependences[0], next(iter(chain.kernels[1])))] == [
            (0, 256),
            (256, 512),
        ]

    def test_a_batch_reads_its_own_matrix_only(self) -> None:
        chain = chain_of(with_edge(kind="batched", batches=2))
        rows = [chain.spans(chain.dependences[0], tile)[0][0] for tile in chain.kernels[1] if tile.col == 0]
        assert rows == [(0, 256), (0, 256), (256, 512), (256, 512)]

    def test_the_same_tile_is_read_element_by_element(self) -> None:
        chain = chain_of(with_edge(kind="tile"))
        for tile in chain.kernels[1]:
            ((rows, cols),) = chain.spans(chain.dependences[0], tile)
            assert rows == (tile.row * 128, tile.row * 128 + 128)
            assert cols == (tile.col * 64, tile.col * 64 + 64)

    def test_an_affine_dependence_says_the_same_as_a_named_one(self) -> None:
        rows = {"lo": {"start": -17, "row": 128}, "hi": {"start": 145, "row": 128}}
        affine = chain_of(with_edge(kind="affine", regions=[{"rows": rows}]))
        assert affine.dependences == chain_of(with_edge(kind="conv3x3", width=16)).dependences
        fixed = chain_of(with_edge(kind="affine", regions=[{"cols": {"lo": 0, "hi": 8}, "walk": "cols"}]))
        assert fixed.dependences == (Dependence(0, 1, (Region(whole(512), Interval(Index(0), Index(8)), "cols"),)),)

    @pytest.mark.parametrize(
        "edge",
        [
            {"kind": "row"}, {"kind": "tile"}, {"kind": "strided", "parts": 2}, {"kind": "conv3x3", "width": 16},
            {"kind": "batched", "batches": 2}, {"kind": "affine", "regions": [{"walk": "rows"}]},
        ],
    )  # fmt: skip
    def test_policies_follow_from_every_kind_of_dependence(self, edge: dict[str, Any]) -> None:
        assert len(policies(chain_of(with_edge(**edge)))) >= 2


@pytest.mark.parametrize("path", sorted(SCENARIOS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_scenarios_name_chains(path: Path) -> None:
    if yaml.safe_load(path.read_text())["kind"] == "tiles":
        assert load(path).chain


@pytest.mark.parametrize(
    ("chain", "key", "found", "wanted"),
    [
        ({**MLP, "m": 0}, "chain.m", "0", "an integer from 1 to 10000000"),
        ({**MLP, "m": [512, "x"]}, "chain.m.1", "the string 'x'", "an integer from 1"),
        ({**MLP, "m": [512, 512]}, "chain.m", "512 twice", "each value once"),
        ({**MLP, "m": None}, "chain.m", "null", "an integer from 1"),
        ({**MLP, "kind": "mpl"}, "chain.kind", "the string 'mpl'", "(the nearest: mlp)"),
        ({"m": 1}, "chain.kind", "nothing", "attention, conv, custom, gated_mlp or mlp"),
        (3, "chain", "3", "a mapping with kind: "),
        ([], "chain", "an empty list", "a mapping with kind: "),
        ([MLP, {**MLP, "m": 0}], "chain.1.m", "0", "an integer from 1"),
        ({**MLP, "model": "gpt-3"}, "chain.model", "the string 'gpt-3'", "gpt3"),
        ({**MLP, "model": "llama-65b"}, "chain.model", "llama-65b, whose MLP is gated", "kind: gated_mlp"),
        ({**MLP, "tensor_parallel": 7}, "chain.tensor_parallel", "7, which does not divide the 49152", "a divisor"),
        ({**MLP, "images": 4}, "chain.images", "a key of another kind", "m, tensor_parallel, kind"),
        ({**MLP, "tile": {"up": {"rows": 128}}}, "chain.tile.up.cols", "nothing", "an integer from 1 to 4096"),
        ({**MLP, "tile": {"upp": {}}}, "chain.tile.upp", "an unknown key", "chain.tile.up"),
        (
            {**MLP, "tile": {"up": {"rows": 64, "cols": 64}}},
            "chain.tile.up", "a tile of 64x64x64 without costs", "128x256x64 or 128x128x64, which profile made-up has",
        ),
        (
            {**MLP, "tile": {"up": {"rows": 64, "cols": 64, "cost": "c"}}},
            "chain.tile.up.cost", "'c'", "costs of profile made-up: gemm 128x256x64, ",
        ),
        ({"kind": "conv", "model": "vgg19", "images": 1, "channels": 65}, "chain.channels", "65", "64, 128, 256 or"),
        ({**PAIR, "dependences": []}, "chain.dependences", "an empty list", "a list of one or more of a mapping"),
        (with_edge(kind="rows"), "chain.dependences.0.kind", "the string 'rows'", "(the nearest: row)"),
        (with_edge(kind="row", consumer="c"), "chain.dependences.0.consumer", "the string 'c'", "a or b"),
        (with_edge(kind="row", producer="b"), "chain.dependences.0.consumer", "the string 'b'", "a kernel after b"),
        (with_edge(kind="strided", parts=3), "chain.dependences.0.parts", "3", "a divisor of the 512 columns of a"),
        (with_edge(kind="batched", batches=3), "chain.dependences.0.batches", "3", "a divisor of the 512 rows of a"),
        (with_edge(kind="conv3x3"), "chain.dependences.0.width", "nothing", "an integer from 1"),
        (
            with_edge(kind="affine", regions=[{"rows": {"lo": 0, "hi": "x"}}]),
            "chain.dependences.0.regions.0.rows.hi", "the string 'x'", "a mapping with start, row, col, slice",
        ),
        ({**PAIR, "kernels": [PAIR["kernels"][0]] * 2}, "chain.kernels.1.name", "the string 'a' twice", "of its own"),
        (
            {**PAIR, "kernels": [{**PAIR["kernels"][0], "tile": [128]}, PAIR["kernels"][1]]},
            "chain.kernels.0.tile.1", "nothing", "an integer from 1",
        ),
        (
            {**PAIR, "kernels": [{**PAIR["kernels"][0], "steps": 4}, PAIR["kernels"][1]]},
            "chain.kernels.0.k", "k or steps", "either k or steps",
        ),
        (
            {**PAIR, "kernels": [PAIR["kernels"][0], {**PAIR["kernels"][1], "cost": "x"}]},
            "chain.kernels.1.cost", "'x'", "or tile_us",
        ),
        ({**MLP, "m": 10_000_000}, "chain", "a chain of ", "at most 50,000"),
    ],
)  # fmt: skip
def test_one_mistake_gets_one_sentence(chain: Any, key: str, found: str, wanted: str) -> None:
    error = refusal(chain)
    assert [problem.key for problem in error.problems] == [key]
    assert found in error.found
    assert wanted in error.wanted
    assert "\n" not in str(error)


def test_mistakes_stand_on_their_lines() -> None:
    text = "kind: tiles\nname: n\nprofile: p\nchain:\n- kind: mlp\n  model: gpt3\n  m: [1, 0]\n- kind: nothing\n"
    with pytest.raises(InputError) as caught:
        parse(text, "x.yaml")
    assert [str(problem).partition(": ")[0] for problem in caught.value.problems] == ["x.yaml:7", "x.yaml:8"]


def test_an_option_is_blamed_for_its_own_mistake() -> None:
    assert str(refusal(MLP, "chain.m=[512, 0]")).startswith("--set: chain.m.1: found 0, wanted an integer from 1")
    assert parse(text_of(MLP), sets=["chain.m=64"]).chain[0].m == (64,)  # type: ignore[union-attr]


def test_each_kind_of_scenario_names_the_command_for_the_other() -> None:
    serving = (SCENARIOS / "async_1b_h200.yaml").read_text()
    with pytest.raises(InputError, match=r"kind: found serving, wanted tiles: `batchsim run` is the command"):
        parse(serving)
    with pytest.raises(InputError, match=r"kind: found tiles, wanted serving: `batchsim tiles` is the command"):
        parse_serving(text_of(MLP))


def test_the_schema_holds_every_kind() -> None:
    schema = scenario_json_schema()
    assert set(schema["discriminator"]["mapping"]) == {"serving", "dynamic", "training", "tiles", "sweep", "plan"}
    tiles = schema["$defs"]["TilesScenario"]["properties"]
    assert all(tiles[key].get("description") for key in TilesScenario.model_fields)


def test_a_scenario_dumps_to_json_that_loads_again() -> None:
    for chain in (MLP, PAIR, with_edge(kind="affine", regions=[{"rows": {"lo": 0, "hi": {"row": 3}}}])):
        scenario = parse(text_of(chain))
        assert parse(json.dumps(scenario.model_dump(mode="json"))) == scenario


def test_the_readme_s_example_is_a_chain_with_policies() -> None:
    readme = (SCENARIOS.parent / "README.md").read_text()
    example = textwrap.dedent("    kind: tiles" + readme.partition("\n    kind: tiles")[2].partition("\n\n")[0])
    (case,) = cases(parse(example), tile_profile())
    assert len(policies(case.candidates[0].chain)) > 2
