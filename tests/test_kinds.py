"""Every kind of scenario through the same commands; pages that a browser draws; what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from batchsim.cli import app
from batchsim.kinds import KINDS, kind_of
from tests.test_report import BROWSERS, dumped

SCENARIOS = Path(__file__).parents[1] / "scenarios"
DYNAMIC, TRAINING = SCENARIOS / "dynamic_bert_h200.yaml", SCENARIOS / "training_1b_h200.yaml"
# The pictures of each page.
PICTURES = {
    DYNAMIC: {
        "latency-e2e",
        "latency-queue",
        "latency-parts",
        "batch-sizes",
        "load-throughput",
        "load-e2e",
        "timeline",
    },
    TRAINING: {"timeline", "close-up", "idle"},
}
FEWER = {DYNAMIC: ["--set", "workload.num_prompts=2000"], TRAINING: ["--set", "steps=2"]}


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.mark.parametrize("path", sorted(SCENARIOS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_file_is_read_as_the_kind_that_it_says(path: Path) -> None:
    said = yaml.safe_load(path.read_text())["kind"]
    assert kind_of(path) is KINDS.get(said, KINDS["serving"])


@pytest.mark.parametrize("file", PICTURES, ids=lambda path: path.stem)
def test_a_page_has_the_pictures_of_its_kind(file: Path, tmp_path: Path) -> None:
    told = call("run", file, *FEWER[file], "--json", "--out", tmp_path)
    assert told.exit_code == 0
    assert set(json.loads(told.stdout)["schedules"]) == {"sync", "async"}
    page = tmp_path / "report.html"
    drawn = set(re.findall(r'<div class="plot" id="([^"]+)">', page.read_text(encoding="utf-8")))
    assert drawn >= PICTURES[file]
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser found: looked for {', '.join(BROWSERS)}")
    root = re.search(r"<html[^>]*>", dumped(browser, page, tmp_path))
    assert root is not None
    assert "data-error" not in root[0]
    assert f'data-rendered="{len(drawn)}"' in root[0]


@pytest.mark.parametrize("file", [*PICTURES, SCENARIOS / "async_8b_h200.yaml"], ids=lambda path: path.stem)
def test_memory_adds_up_and_has_a_page(file: Path, tmp_path: Path) -> None:
    told = call("memory", file, "--json", "--out", tmp_path)
    assert told.exit_code == 0
    value = json.loads(told.stdout)
    assert sum(value["terms"].values()) == value["total_bytes"]
    assert value["fits"] and value["allocated_bytes"] <= value["reserved_bytes"] <= value["total_bytes"]
    assert json.loads((tmp_path / "memory.json").read_text()) == value
    assert "Where the memory goes" in (tmp_path / "report.html").read_text(encoding="utf-8")
    shown = call("memory", file)
    assert shown.exit_code == 0
    assert "fits." in shown.stdout


def test_the_largest_batch_that_memory_tells_runs_and_one_more_is_refused() -> None:
    def sets(micro_batch: int) -> list[str]:
        of_two = f"global_batch={2 * micro_batch}"
        return ["--set", of_two, "--set", f"micro_batch={micro_batch}", "--set", "steps=1", "--schedules", "sync"]

    refused = call("run", TRAINING, *sets(64))
    assert refused.exit_code == 2
    assert refused.stderr.startswith(f"{TRAINING}: micro_batch: found 64, which takes ")
    told = re.search(r"wanted at most (\d+), what fits the device's", refused.stderr)
    assert told is not None
    assert call("run", TRAINING, *sets(int(told[1]))).exit_code == 0
    assert call("run", TRAINING, *sets(int(told[1]) + 1)).exit_code == 2


@pytest.mark.parametrize("command", ["memory", "validate"])
def test_a_table_of_times_has_neither_memory_nor_a_device(command: str) -> None:
    told = call(command, SCENARIOS / "dynamic_table.yaml")
    assert told.exit_code == 2
    assert "costs: found a table, wanted a model" in told.stderr
    assert "Traceback" not in told.stderr


def test_a_model_is_calibrated_for_what_it_is_asked_for(tmp_path: Path) -> None:
    told = call("calibrate", "--model", "llama-160m", "--device", "cpu", "--out", tmp_path / "x.json")
    assert told.exit_code == 2
    assert "--model: found the string 'llama-160m'" in told.stderr
    told = call("calibrate", "--model", "bert-base", "--training", "--device", "cpu", "--out", tmp_path / "x.json")
    assert told.exit_code == 2
    assert "--model: found the string 'bert-base'" in told.stderr
