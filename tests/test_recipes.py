"""The recipe of transformers' continuous batching: what it refuses, and a sync run on the CPU."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from calibration.recipes.transformers_batching import Run, main

SMALL = [
    "--layers=2", "--hidden=64", "--heads=4", "--kv-heads=2", "--intermediate=128", "--vocab=500", "--batch=4",
    "--prompt-tokens=16", "--profile-at=8", "--profile-steps=4", "--new-tokens=40", "--attention=sdpa", "--device=cpu",
]  # fmt: skip

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit code, and what is said on stderr, which is one line."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    code = caught.value.code
    if not isinstance(code, int):  # the interpreter prints it, and exits with 1
        code, err = 1, f"{err}{code}\n"
    assert not out and err.count("\n") == 1
    return code, err


@pytest.mark.parametrize(("arguments", "said"), [
    (["--batch", "0"], "argument --batch: must be a number from 1 to 999999999, found '0'"),
    (["--batch", "many"], "found 'many'"),
    (["--batch", "9" * 5000], "--batch: must be a number"),
    (["--mode", "later"], "argument --mode: invalid choice: 'later'"),
    (["--modes", "sync"], "--modes"),
    (["--batch", "64", "--max-batch-tokens", "64"], "--max-batch-tokens must exceed --batch, found 64 and 64"),
    (["--new-tokens", "10"], "--new-tokens must be at least 13 for steps that are steady, found 10"),
    (["--trace-out", "t.json", "--new-tokens", "67"], "--new-tokens must be at least 68 for steps that are steady"),
    (["--trace-out", "t.json", "--profile-at", "5"], "--profile-at must be at least 6, when all requests decode"),
    (["--heads", "30"], "--hidden must be a multiple of --heads"),
    (["--kv-heads", "5"], "--heads of --kv-heads"),
    (["--out", "/"], "--out must be a file, found the folder /"),
    (["--trace-out", "/"], "--trace-out must be a file, found the folder /"),
])  # fmt: skip
def test_arguments_are_refused_in_a_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    code, err = failure(capsys, *arguments)
    assert code == 2
    assert said in err and err.startswith("python -m calibration.recipes.transformers_batching: ")


def test_a_missing_package_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, err = failure(capsys, *SMALL)
    assert code == 1 and "transformers" in err


@needs_transformers
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(("arguments", "said"), [
    (["--device", "cuda"], "no CUDA device was found"),
    (["--attention", "builtin"], "the built-in attention needs a CUDA GPU; on a CPU choose --attention sdpa"),
    (["--mode", "async"], "asynchronous batching needs a CUDA GPU"),
    (["--device", "abacus"], "abacus"),
])  # fmt: skip
@pytest.mark.filterwarnings("default")
def test_what_the_machine_lacks_is_told(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    code, err = failure(capsys, *SMALL, *arguments)
    assert code == 1 and said in err


def test_steps_at_either_end_are_left_out_while_prompts_are_computed() -> None:
    assert Run(batch=8, prompt_tokens=256, max_batch_tokens=2048).ramp == 2 + 4
    assert Run(batch=2, prompt_tokens=16, max_batch_tokens=2048).ramp == 1 + 4


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The report and the trace of a sync run."""
    out = tmp_path_factory.mktemp("recipe") / "new"
    main([*SMALL, "--out", str(out / "sync.json"), "--trace-out", str(out / "traces" / "sync.json.gz")])
    return json.loads((out / "sync.json").read_text()), out / "traces" / "sync.json.gz"


@needs_transformers
@pytest.mark.filterwarnings("default")
class TestOnTheCpu:
    def test_the_report_has_what_whatif_takes(self, files: tuple[dict[str, Any], Path]) -> None:
        report, _ = files
        timed = report["timed"]
        assert timed["tokens"] == 4 * 40 and timed["steps"] == len(timed["step_ms"])
        inner = ("cb.prepare/schedule", "cb.prepare/build_inputs")
        assert sum(timed["host_ms_p50"][name] for name in inner) <= 1.5 * timed["host_ms_p50"]["cb.prepare"]
        assert 0 < timed["host_ms_p50"]["cb.prepare"] < timed["step_ms_p50"]
        assert report["args"]["attention"] == "sdpa" and report["device"] == "cpu"

    def test_the_same_tokens_come_of_the_same_seed(self, files: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
        main([*SMALL, "--out", str(tmp_path / "again.json")])
        again = json.loads((tmp_path / "again.json").read_text())
        assert again["timed"]["tokens_sha1"] == files[0]["timed"]["tokens_sha1"]
        assert "profiled" not in again

    def test_the_trace_has_the_steps_asked_for(self, files: tuple[dict[str, Any], Path]) -> None:
        events = json.loads(gzip.decompress(files[1].read_bytes()))["traceEvents"]
        names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
        assert names.count("cb.step") == names.count("cb.prepare") == names.count("cb.update") == 4
