"""The shipped profiles: whole, measured on a GPU, and not at odds with physics."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from batchsim.errors import InputError
from batchsim.model import MODELS
from batchsim.profile import LoopFit, PhaseFit, Profile, load_profile
from batchsim.schedules import LOOPS
from calibration.cells import Cell
from calibration.points import PROFILES
from tests.profiles import small_profile

FOLDER = Path(__file__).parents[1] / "calibration" / "profiles"
# Those of decoders; the profiles of services are held to their points.
PATHS = sorted(path for path in FOLDER.glob("*.json") if path.stem in PROFILES.values())
NONE_YET = "no profiles are shipped"
PHASES = ("schedule", "build_inputs", "copy_in", "copy_out", "record", "update")
PROVENANCE = ("device", "driver", "torch", "triton", "host_cpu", "date", "command")


@pytest.fixture(
    scope="module",
    params=[pytest.param(path, id=path.stem) for path in PATHS]
    or [pytest.param(FOLDER, marks=pytest.mark.skip(reason=NONE_YET), id="none")],
)
def profile(request: pytest.FixtureRequest) -> Profile:
    return load_profile(request.param.stem)


def fits(loop: LoopFit, name: str) -> dict[str, PhaseFit]:
    """What every loop pays for, and `name` of it."""
    always = {phase: loop.phases[phase] for phase in PHASES}
    if name.endswith("/graph"):
        always["launch"] = loop.phases["launch"]
    if name.startswith("async/"):
        always["stream_wait"] = loop.phases["stream_wait"]
    return always | {"kernel_launch": loop.kernel_launch}


@pytest.mark.skipif(not PATHS, reason=NONE_YET)
def test_every_model_of_the_validation_has_its_profile() -> None:
    assert {path.stem for path in PATHS} >= set(PROFILES.values())
    assert {name: load_profile(profile).model for name, profile in PROFILES.items()} == {
        name: name for name in PROFILES
    }


def test_names_its_model_and_holds_every_loop(profile: Profile) -> None:
    assert (FOLDER / f"{profile.name}.json").is_file()
    assert profile.kernels.layers == MODELS[profile.model].num_layers
    assert set(profile.loops) == {f"{schedule}/{how}" for schedule in LOOPS for how in ("graph", "eager")}


def test_says_where_it_comes_from_and_names_no_path_of_that_machine(profile: Profile) -> None:
    for key in PROVENANCE:
        assert profile.provenance.get(key), key
    assert profile.model in profile.provenance["command"]
    text = (FOLDER / f"{profile.name}.json").read_text(encoding="utf-8")
    for folder in ("/tmp/", "/root/", "/home/", "/mnt/"):
        assert folder not in text


def test_host_costs_are_positive_and_their_residuals_stated(profile: Profile) -> None:
    cells = {Cell(**entry["cell"]).key for entry in profile.cells}
    for name, loop in profile.loops.items():
        for phase, fit in fits(loop, name).items():
            assert all(fit.mean_ns(rows) > 0 for rows in (1, 32, 256)), (name, phase)
            assert fit.residuals, (name, phase)
            assert set(fit.residuals) <= cells
            assert fit.samples >= len(fit.residuals)
        assert min(loop.launch_ns, loop.wake_up_ns, loop.copy_in_device_ns, loop.copy_out_device_ns) > 0, name
        # A device that is never kept busy shows no gap of its own.
        assert min(loop.copy_ns, loop.event_ns, loop.gap_ns) >= 0, name


def test_device_costs_are_positive_and_their_residuals_stated(profile: Profile) -> None:
    device = profile.device
    assert device.prefill.residuals
    assert all(ns > 0 for ns in device.prefill.ns)
    assert device.prefill.pair_ns + device.prefill.depth_ns > 0
    assert 0 < device.outer_share < 0.6
    assert 0.8 < device.eager_factor < 2
    for ratios in (device.decode_ratios, device.prefill_ratios):
        assert sum(ratios) / len(ratios) == pytest.approx(1, abs=1e-3)


def test_decoding_costs_more_the_longer_the_contexts(profile: Profile) -> None:
    for curve in profile.device.decode:
        assert curve.kv_tokens == sorted(set(curve.kv_tokens))
        assert all(longer > shorter for shorter, longer in pairwise(curve.ns)), curve.size


@pytest.mark.parametrize("context", [64, 512, 2048])
def test_more_rows_of_a_context_never_cost_much_less(profile: Profile, context: int) -> None:
    for few, many in pairwise(profile.device.decode):
        assert many.at(many.size * context) >= 0.9 * few.at(few.size * context), (few.size, many.size)


def test_decoding_takes_no_less_than_reading_the_weights(profile: Profile) -> None:
    """Five terabytes a second is more than any memory of today's GPUs gives."""
    shape = MODELS[profile.model]
    assert min(curve.ns[0] for curve in profile.device.decode) > shape.parameters * shape.dtype_bytes / 5e12 * 1e9


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda p: p["device"].update(decode=[]), "device.decode"),
        (lambda p: p["device"]["decode"][0]["ns"].pop(), "points have"),
        (lambda p: p["device"]["decode"][0].update(kv_tokens=[8, 8]), "must rise"),
        (lambda p: p["device"].update(decode=p["device"]["decode"][::-1]), "must rise"),
        (lambda p: p["device"]["prefill"]["ns"].pop(), "points have"),
        (lambda p: p["loops"]["sync/graph"]["phases"].pop("update"), "phases lack update"),
        (lambda p: p["loops"]["sync/graph"].update(launch_ns=-5), "launch_ns"),
        (lambda p: p.update(kind="recipe"), "kind"),
    ],
)
def test_a_profile_that_makes_no_sense_is_refused(
    change: Callable[[dict[str, Any]], object], told: str, tmp_path: Path
) -> None:
    content = small_profile().model_dump(mode="json")
    change(content)
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match=told):
        load_profile(str(path))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="no text"):
        load_profile(str(path))


def test_rows_beyond_the_largest_graph_cost_as_between_the_last_two() -> None:
    fit = small_profile().device
    assert fit.beyond_ns(32) == 0
    assert fit.beyond_ns(132) == pytest.approx(100 * 2_000, rel=1e-3)
