"""MLPs are found in a trace by their products' shapes, and what tile synchronisation saves of them keeps some laws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchsim.learned import Kernels, LearnedProfile, Operation, Step, TracedMlp, Work
from batchsim.model import MODELS
from batchsim.tiles.level import MlpLevel, MlpShape, TileLevel
from batchsim.tiles.profile import TileProfile, tile_profile_of
from batchsim.whatif.tile_sync import apply, saved_ns
from batchsim.whatif.variants import asynchronous, synchronous
from batchsim.whatif.variants import plain as steps_of
from calibration.kineto import Trace
from calibration.learn import learn
from calibration.products import Product, mlp_chains, product_of
from calibration.steps import find_steps
from tests.mlp_traces import GELU, SILU, Launch, attention, fused, gated, plain, product, traced

GAP_NS = 500
HIDDEN, INNER = 4096, 14336


def chains(trace: Trace) -> tuple[list[TracedMlp], list[str]]:
    return mlp_chains(trace, find_steps(trace), GAP_NS)


def learned(trace: Trace) -> LearnedProfile:
    return learn(trace).model_copy(update={"chains": chains(trace)[0]})


def profile_of(*mlps: TracedMlp, device: str = "NVIDIA H200") -> LearnedProfile:
    step = Step(traced_ns=1000, operations=[Work(phase="host", ns=1000, events=0)])
    return LearnedProfile(
        source="made up", device=device, found_by="nothing", steps_in_trace=1, launch_ns=0, queued_gap_ns=0,
        graph_gap_ns=0, replay_error=0.0, chains=list(mlps), provenance={}, steps=[step],
    )  # fmt: skip


def mlp(
    rows: int, us: float, *, hidden: int = HIDDEN, inner: int = INNER, count: float = 32, **changes: float
) -> TracedMlp:
    times = {"ns": us * 1e3, "products_ns": us * 900} | changes
    return TracedMlp(kind="gated_mlp", rows=rows, hidden=hidden, inner=inner, count=count, **times)


def saved(*mlps: TracedMlp) -> float:
    told = saved_ns(profile_of(*mlps))
    assert isinstance(told, tuple) and told[1].endswith(".")
    return told[0]


@pytest.fixture(scope="module")
def tiles() -> TileProfile:
    profile = tile_profile_of("NVIDIA H200")
    assert profile is not None
    return profile


# What is found.


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize(
    ("of", "kind", "kernels"), [(gated, "gated_mlp", 5), (fused, "gated_mlp", 3), (plain, "mlp", 3)]
)
def test_mlps_are_found_with_their_kernels_time(tmp_path: Path, of: object, kind: str, kernels: int, ids: bool) -> None:
    layers = 3
    launches = layers * [*attention(256, 1024, 60.0), *of(256, 1024, 4096, 90.0)]  # type: ignore[operator]
    (found,), notes = chains(traced(tmp_path, launches, ids=ids))
    small = {5: 2, 3: 1}[kernels]
    assert (found.kind, found.rows, found.hidden, found.inner, found.count) == (kind, 256, 1024, 4096, layers)
    assert found.ns == pytest.approx(90e3 + small * 3e3 + kernels * GAP_NS, abs=5)
    assert found.products_ns == pytest.approx(90e3 + (kernels - small) * GAP_NS, abs=5)
    assert notes == []


def test_each_shape_is_counted_by_itself_those_with_most_time_first(tmp_path: Path) -> None:
    launches = [*gated(64, 1024, 4096, 30.0), *2 * gated(64, 2048, 4096, 60.0)]
    found, _ = chains(traced(tmp_path, launches))
    assert [(each.hidden, each.count) for each in found] == [(2048, 2), (1024, 1)]


@pytest.mark.parametrize(
    "launches",
    [
        attention(256, 1024, 60.0),
        [product(256, 4096, 1024, 30.0), product(256, 1024, 4096, 30.0)],  # nothing between them
        [product(256, 4096, 1024, 30.0), ("aten::gelu", None, GELU, 3.0), product(128, 1024, 4096, 30.0)],
        [product(256, 4096, 1024, 30.0), ("aten::gelu", None, GELU, 3.0), product(256, 2048, 4096, 30.0)],
        [product(256, 4096, 1024, 30.0), ("aten::topk", None, "sort", 3.0), product(256, 1024, 4096, 30.0)],
        [  # a product of another type of batch in between
            product(256, 4096, 1024, 30.0), ("aten::silu", None, SILU, 3.0),
            ("aten::bmm", [[8, 256, 64], [8, 64, 64]], "nvjet_sm90_tst", 9.0), product(256, 1024, 4096, 30.0),
        ],
    ],
)  # fmt: skip
def test_products_that_are_no_mlp_are_left_alone(tmp_path: Path, launches: list[Launch]) -> None:
    found, notes = chains(traced(tmp_path, launches))
    assert found == []
    assert "record_shapes=True" in notes[0]


def test_a_pile_of_square_layers_is_no_gated_mlp(tmp_path: Path) -> None:
    layer: list[Launch] = [product(256, 1024, 1024, 10.0), ("aten::gelu", None, GELU, 3.0)]
    (found,), _ = chains(traced(tmp_path, 4 * layer))
    assert (found.kind, found.count) == ("mlp", 2)


@pytest.mark.parametrize(("how", "why"), [({"shapes": False}, "no shapes"), ({"graph": True, "shapes": True}, "graph")])
def test_without_shapes_a_note_says_how_to_record_them(tmp_path: Path, how: dict[str, Any], why: str) -> None:
    found, (note,) = chains(traced(tmp_path, 4 * gated(64, 1024, 4096, 30.0), **how))
    assert found == []
    assert why in note and "record_shapes=True" in note and "without CUDA graphs" in note


@pytest.mark.parametrize(
    "gemm", ["ampere_sgemm_128x64_tn", "nvjet_qqtst_128x256_128x4_1x2_h_bz", "sm80_xmma_gemm_tf32"]
)
def test_products_of_other_types_are_left_out_with_a_note(tmp_path: Path, gemm: str) -> None:
    launches = [product(*sizes, 30.0, gemm=gemm) for sizes in ((64, 4096, 1024), (64, 1024, 4096))]
    found, (note,) = chains(traced(tmp_path, [launches[0], ("aten::gelu", None, GELU, 3.0), launches[1]]))
    assert found == []
    assert "16 bits" in note


@pytest.mark.parametrize(
    ("operator", "dims", "made"),
    [
        ("aten::linear", "[[2, 3, 8], [16, 8], []]", Product(6, 16, 8)),
        ("aten::addmm", "[[16], [6, 8], [8, 16], [], []]", Product(6, 16, 8)),
        ("aten::bmm", "[[1, 6, 8], [1, 8, 16]]", Product(6, 16, 8)),
        ("aten::bmm", "[[2, 6, 8], [2, 8, 16]]", None),
        ("aten::matmul", "[[6, 8], [8]]", None),
        ("aten::mm", "[[6, 8], [9, 16]]", None),
        ("aten::mm", "[[0, 8], [8, 16]]", None),
        ("aten::mm", "[[-6, 8], [8, -16]]", None),
        ("aten::mm", "[]", None),
        ("aten::mm", None, None),
    ],
)
def test_the_shapes_of_operators(operator: str, dims: str | None, made: Product | None) -> None:
    assert product_of(operator, dims) == made


# What is saved.


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([1, 32, 64, 100, 320, 768]),
    st.sampled_from([256, 2048, 4096]),
    st.sampled_from([512, 8192, 14336]),
    st.floats(0.5, 1e5),
    st.floats(0.1, 1),
)
def test_what_is_saved_is_never_negative_and_less_than_there_was(
    rows: int, hidden: int, inner: int, us: float, share: float
) -> None:
    one = mlp(rows, us, hidden=hidden, inner=inner, products_ns=us * 1e3 * share)
    assert 0 <= saved(one) < one.ns * one.count


def test_it_grows_with_layers_and_with_the_traced_time(tiles: TileProfile) -> None:
    slow, slower = (mlp(768, us, hidden=5120, inner=25600, products_ns=8e5) for us in (1200.0, 1500.0))
    once = saved(slow)
    assert once > 0
    assert saved(slow.model_copy(update={"count": 64.0})) == pytest.approx(2 * once)
    assert saved(slow, slow) == pytest.approx(2 * once)
    assert saved(slower) - once == pytest.approx(300e3 * 32)
    fastest = MlpLevel(MlpShape("gated_mlp", 5120, 25600), tiles).fastest(768)
    assert fastest is not None and once == pytest.approx((1200e3 - fastest.time_ns) * 32)


@pytest.mark.parametrize("rows", [8, 32, 640, 2048])
def test_nothing_where_the_library_is_the_fastest(tiles: TileProfile, rows: int) -> None:
    assert TileLevel(MODELS["llama-3.1-8b"], tiles).choice(rows) is None
    told = saved_ns(profile_of(mlp(rows, 1e6)))
    assert isinstance(told, tuple) and told[0] == 0
    assert "nothing to gain" in told[1] and f"{rows} rows" in told[1]


def test_a_slower_clock_is_not_taken_for_a_gain(tiles: TileProfile) -> None:
    """All kernels a tenth slower than at rest: so would ours be."""
    library = MlpLevel(MlpShape("gated_mlp", HIDDEN, INNER), tiles).library
    assert library is not None
    for rows in (1792, 3072):
        us = library.at(rows) / 1e3
        at_rest, loaded = (saved(mlp(rows, 1.1 * us * slower, products_ns=us * slower * 1e3)) for slower in (1, 1.1))
        assert at_rest > 0
        assert loaded == pytest.approx(1.1 * at_rest)


def test_an_mlp_too_large_to_simulate_is_told_from_fewer_rows_or_not_at_all() -> None:
    many = mlp(100_000, 1e9)
    assert saved(many) > 0
    told = saved_ns(profile_of(mlp(64, 1e9, inner=1 << 30)))
    assert isinstance(told, tuple) and told[0] == 0 and "no tiles for" in told[1]


def test_another_device_is_refused() -> None:
    for device in ("NVIDIA A100-SXM4-80GB", "unknown device"):
        told = saved_ns(profile_of(mlp(768, 1e6), device=device))
        assert isinstance(told, str) and device in told and "NVIDIA H200" in told


def test_without_a_known_mlp_it_is_refused_with_how_to_record() -> None:
    told = saved_ns(profile_of())
    assert isinstance(told, str) and "record_shapes=True" in told


# What becomes of the steps.


def device_ns(steps: list[list[Operation]]) -> float:
    return sum(sum(o.device_ns) for step in steps for o in step if isinstance(o, Kernels)) / len(steps)


def test_from_a_trace_to_steps_that_take_less(tmp_path: Path) -> None:
    profile = learned(traced(tmp_path, 8 * gated(768, 5120, 25600, 1100.0)))
    told = saved_ns(profile)
    assert isinstance(told, tuple) and told[0] > 0 and "8 gated MLPs a step of 768 rows (5120 x 25600)" in told[1]
    before = steps_of(profile.steps)
    after = apply(before, told[0])
    assert device_ns(before) - device_ns(after) == pytest.approx(told[0], rel=1e-3)
    for schedule in (synchronous, asynchronous):
        assert device_ns(schedule(before)) - device_ns(schedule(after)) == pytest.approx(told[0], rel=1e-3)
    host = [[o.host_ns for o in step if isinstance(o, Kernels)] for step in before]
    assert host == [[o.host_ns for o in step if isinstance(o, Kernels)] for step in after]


def test_graphs_stay_and_no_time_is_below_nothing() -> None:
    graph = Kernels(phase="p", stream=7, host_ns=[10], events=[1], device_ns=[1000], nodes=4)
    single = Kernels(phase="p", stream=7, host_ns=[10, 10], events=[1, 1], device_ns=[300, 100])
    assert apply([[graph, single]], 100.0) == [[graph, single.model_copy(update={"device_ns": [225, 75]})]]
    assert apply([[graph, single]], 1e9) == [[graph, single.model_copy(update={"device_ns": [0, 0]})]]
    assert apply([[graph]], 100.0) == [[graph]]
    assert np.isfinite(device_ns(apply([[single]], 0.0)))
