"""`batchsim tiles`: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from batchsim.cli import app
from tests.tile_profiles import write_tile_profile

ROOT = Path(__file__).parents[1]
SERVING = str(ROOT / "scenarios" / "async_8b_h200.yaml")
TEXT = """kind: tiles
name: one MLP
profile: made-up.json
chain:
  kind: gated_mlp
  model: llama-3.2-1b
  m: 256
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    write_tile_profile(tmp_path)
    path = tmp_path / "mlp.yaml"
    path.write_text(TEXT)
    return str(path)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["tiles", *arguments], catch_exceptions=False)


def test_prints_a_table_with_the_profile_beside_the_scenario(file: str) -> None:
    result = call(file)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "StreamSync" in result.stdout
    assert "utilisation: share of the slots' time" in result.stdout


def test_json_is_all_that_stdout_holds_and_the_same_every_time(file: str, tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    result = call(file, "--json", "--out", str(out))
    told = json.loads(result.stdout)
    assert told["name"] == "llama-3.2-1b gated mlp, m = 256"
    assert told["device"] == "made-up device"
    assert json.loads((out / "result.json").read_text()) == told
    assert {path.name for path in out.iterdir()} == {"result.json", "report.html"}
    assert call(file, "--json").stdout == result.stdout


def test_several_sizes_are_several_cases(file: str) -> None:
    told = json.loads(call(file, "--json", "--set", "chain.m=[128, 256]").stdout)
    assert [case["name"][-3:] for case in told["cases"]] == ["128", "256"]
    assert told["cases"][1]["baseline_us"] == json.loads(call(file, "--json").stdout)["baseline_us"]


def test_the_profile_may_be_another_one(file: str, tmp_path: Path) -> None:
    result = call(file, "--set", "profile=nowhere", "--profile", str(tmp_path / "made-up.json"))
    assert result.exit_code == 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--set", "chain.m=x"], "--set: chain.m: found the string 'x', wanted an integer from 1"),
        (["--device", "cpu"], "--device: found the string 'cpu', wanted cuda"),
        (["--profile", "nowhere"], "nowhere: profile: found 'nowhere', wanted a tile profile's JSON"),
        (["--out", SERVING], "--out: found a file"),
        (
            ["--set", "chain.tile.down={rows: 1, cols: 1}"],
            "FILE: chain.tile.down: found a tile of 1x1x64 without costs",
        ),
    ],
)
def test_refused_options_exit_2_with_one_sentence(file: str, options: list[str], told: str) -> None:
    result = call(file, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.replace(file, "FILE").startswith(told)
    assert result.stderr.count("\n") == 1


def test_each_command_names_the_other_for_the_other_kind(file: str) -> None:
    assert call(SERVING).stderr.endswith(
        "kind: found serving, wanted tiles: `batchsim run` is the command for this one\n"
    )
    other = CliRunner().invoke(app, ["run", file])
    assert (other.exit_code, other.stdout) == (2, "")
    assert (
        other.stderr == f"{file}:1: kind: found tiles, wanted serving: `batchsim tiles` is the command for this one\n"
    )


def test_without_a_gpu_measuring_fails_with_one_sentence(file: str) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = call(file, "--device", "cuda")
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(r"no CUDA device was found; [^\n]+\n", result.stderr)


def test_a_table_needs_neither_torch_nor_plotly(file: str) -> None:
    code = "import atexit, sys; atexit.register(lambda: print('loaded:', *sys.modules))"
    code += "; import batchsim.cli; batchsim.cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "tiles", file], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {"torch", "plotly", "triton"}.isdisjoint(done.stdout.rpartition("loaded:")[2].split())
