"""Tensor parallelism on the CPU: shards of one model compute what the whole of it does, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

from batchsim.batching.continuous import ContinuousBatcher, Request
from batchsim.errors import InputError, RunError
from batchsim.model import MODELS, ModelShape
from batchsim.operations import HOST_PHASES
from batchsim.schedules import SCHEDULES
from calibration.calibrate import profile_text
from calibration.executor import Decoder, Executor
from calibration.executor.parallel import WHOLE, AllReduce, Shard, Share
from calibration.hardware.ranks import launch
from calibration.hardware.tensor_parallel import app, scenarios
from tests.profiles import small_profile

T = TypeVar("T")
ROOT = Path(__file__).parents[1]
POINTS = ROOT / "calibration" / "validation" / "hardware" / "tensor_parallel.yaml"
# Eight query heads in four groups: two or four devices may share it.
SHAPE = ModelShape("eight", 2, 64, 8, 4, 16, 128, 256, dtype_bytes=4)
LENGTHS = ((5, 7), (33, 4), (1, 9), (70, 6), (16, 1), (40, 12), (3, 3))


def together(size: int, work: Callable[[int, AllReduce], T]) -> list[T]:
    """`work` of every rank in a thread of its own; sums are taken in the order of the ranks."""
    barrier = threading.Barrier(size, timeout=20)
    parts: list[Tensor] = [torch.empty(0)] * size

    def of(rank: int) -> T:
        def all_reduce(tensor: Tensor) -> None:
            parts[rank] = tensor.clone()
            barrier.wait()
            tensor.copy_(torch.stack(parts).sum(0))
            barrier.wait()

        return work(rank, all_reduce)

    with ThreadPoolExecutor(size) as pool:
        return [each.result() for each in [pool.submit(of, rank) for rank in range(size)]]


def decoder(share: Share = WHOLE) -> Decoder:
    return Decoder(
        SHAPE, device="cpu", dtype=torch.float64, seed=7, num_kv_blocks=32, max_num_seqs=4, max_num_batched_tokens=48,
        max_model_len=100, graph_sizes=(1, 2), share=share,
    )  # fmt: skip


def tokens(of: Decoder, schedule: str, *, graphs: bool = False) -> dict[int, list[int]] | None:
    requests = [Request(index, prompt, output) for index, (prompt, output) in enumerate(LENGTHS)]
    batcher = ContinuousBatcher(requests, max_num_seqs=4, max_num_batched_tokens=48, block_size=16, num_kv_blocks=32)
    return Executor(of, graphs=graphs).run(SCHEDULES[schedule](), batcher, keep_tokens=True).tokens


@pytest.fixture(scope="module")
def whole() -> Decoder:
    return decoder()


class TestShards:
    @pytest.mark.parametrize("size", [2, 4])
    def test_generate_the_tokens_of_the_whole_model_on_every_rank(self, whole: Decoder, size: int) -> None:
        expected = tokens(whole, "sync")

        def work(rank: int, all_reduce: AllReduce) -> list[dict[int, list[int]] | None]:
            own = decoder(Shard(rank, size, all_reduce))
            return [tokens(own, schedule) for schedule in ("sync", "async")]

        assert together(size, work) == [[expected, expected]] * size

    @pytest.mark.parametrize("size", [2, 4])
    def test_put_together_are_the_whole_model(self, whole: Decoder, size: int) -> None:
        shards = [decoder(Shard(rank, size, lambda _: None)) for rank in range(size)]
        assert torch.equal(torch.cat([shard.head for shard in shards]), whole.head)
        for shard in shards:
            assert torch.equal(shard.embedding, whole.embedding)
            assert torch.equal(shard.final_norm, whole.final_norm)
        q, kv, inner = (count // size for count in (8 * 16, 4 * 16, 128))
        for index, layer in enumerate(whole.layers):
            parts = [shard.layers[index] for shard in shards]
            rows = [torch.split(part.qkv, [q, kv, kv]) for part in parts]
            assert torch.equal(torch.cat([torch.cat(each) for each in zip(*rows, strict=True)]), layer.qkv)
            halves = [torch.split(part.gate_up, [inner, inner]) for part in parts]
            assert torch.equal(torch.cat([torch.cat(each) for each in zip(*halves, strict=True)]), layer.gate_up)
            assert torch.equal(torch.cat([part.output for part in parts], 1), layer.output)
            assert torch.equal(torch.cat([part.down for part in parts], 1), layer.down)

    @given(
        st.integers(1, 3).flatmap(
            lambda rows: st.lists(
                st.lists(st.integers(-9, 9), min_size=8, max_size=8, unique=True), min_size=rows, max_size=rows
            )
        ),
        st.sampled_from([1, 2, 4]),
    )
    @settings(max_examples=30, deadline=None)
    def test_choose_the_greatest_logit_of_all(self, logits: list[list[int]], size: int) -> None:
        every = torch.tensor(logits, dtype=torch.bfloat16)

        def work(rank: int, all_reduce: AllReduce) -> list[int]:
            out = torch.zeros(len(logits), dtype=torch.int64)
            Shard(rank, size, all_reduce).choose(every.chunk(size, 1)[rank].contiguous(), out)
            return out.tolist()

        assert together(size, work) == [every.argmax(1).tolist()] * size

    @pytest.mark.parametrize("model", ["llama-3.2-1b", "llama-3.1-8b", "tiny"])
    def test_hold_half_of_all_that_is_divided(self, model: str) -> None:
        whole, half = MODELS[model], Shard(0, 2, lambda _: None).shape(MODELS[model])
        assert 2 * half.qkv_size == whole.qkv_size
        assert 2 * half.kv_bytes_per_token == whole.kv_bytes_per_token
        assert 2 * half.head_size == whole.head_size
        norms = 2 * whole.num_layers * whole.hidden_size + whole.hidden_size
        undivided = norms + whole.vocab_size * whole.hidden_size
        assert 2 * (half.parameters - undivided) == whole.parameters - undivided

    def test_of_uneven_sizes_are_refused(self) -> None:
        with pytest.raises(ValueError, match="num_kv_heads of eight is 4, which 3 devices cannot share evenly"):
            Shard(0, 3, lambda _: None).shape(SHAPE)


def sleeping(folder: Path) -> list[str]:
    """A program that writes down who it is and sleeps for a minute."""
    told = f"import os, time; open({str(folder / 'pids')!r}, 'a').write(f'{{os.getpid()}}\\n'); time.sleep(60)"
    return [sys.executable, "-c", told]


def lives(pid: str) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class TestRanks:
    def test_all_are_ended_when_one_fails(self, tmp_path: Path) -> None:
        program = "import sys, time; sys.exit(3) if sys.argv[1] == '1' else time.sleep(60)"
        began = time.monotonic()
        with pytest.raises(RunError, match="rank 1 with exit code 3 failed"):
            launch([sys.executable, "-c", program], 2, limit_s=30)
        assert time.monotonic() - began < 30

    def test_all_are_ended_when_time_is_up(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="2 ranks were not done after 2 s"):
            launch(sleeping(tmp_path), 2, limit_s=2)
        pids = (tmp_path / "pids").read_text(encoding="utf-8").split()
        assert len(pids) == 2
        assert not any(map(lives, pids))

    @pytest.mark.skipif(sys.platform != "linux", reason="what ends with its parent only Linux can be told")
    def test_all_are_ended_when_the_launcher_is_killed(self, tmp_path: Path) -> None:
        program = f"from calibration.hardware.ranks import launch; launch({sleeping(tmp_path)!r}, 2, limit_s=60)"
        launcher = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
        pids: list[str] = []
        while len(pids) < 2:
            assert launcher.poll() is None
            time.sleep(0.05)
            if (tmp_path / "pids").exists():
                pids = (tmp_path / "pids").read_text(encoding="utf-8").split()
        launcher.kill()
        launcher.wait()
        until = time.monotonic() + 30
        while any(map(lives, pids)):
            assert time.monotonic() < until
            time.sleep(0.05)


def written(path: Path, point: dict[str, Any]) -> Path:
    text = json.dumps({"defaults": {"tensor_parallel": 2, "max_num_batched_tokens": 64}, "points": [point]})
    path.write_text(text, encoding="utf-8")
    return path


TINY: dict[str, Any] = {
    "name": "tp2-tiny", "model": "tiny", "profile": "tiny", "max_num_seqs": 4, "schedules": ["async"],
    "level": "operation",
    "workload": {"kind": "fixed", "num_prompts": 4, "input_len": 20, "output_len": 6},
}  # fmt: skip


class TestPoints:
    def test_the_list_is_of_pairs_whose_requests_are_all_there(self) -> None:
        found = scenarios(POINTS)
        assert len(found) >= 6
        assert {scenario.tensor_parallel for scenario in found.values()} == {2}
        assert {scenario.schedules for scenario in found.values()} == {("sync", "async")}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"workload": {**TINY["workload"], "request_rate": 2.0}},
                r"points\[0\].workload: found requests that arrive over time, wanted requests that are all there",
            ),
            ({"replicas": 2}, r"points\[0\].replicas: found 2, wanted 1"),
        ],
    )
    def test_what_ranks_could_decide_differently_is_refused(
        self, tmp_path: Path, change: dict[str, Any], message: str
    ) -> None:
        file = written(tmp_path / "points.yaml", TINY | change)
        with pytest.raises(InputError, match=message):
            scenarios(file)
        told = CliRunner().invoke(app, ["run", str(file), "--device", "cpu"])
        assert told.exit_code == 2
        assert len(told.stderr.splitlines()) == 1

    def test_more_devices_than_there_are_is_told(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        told = CliRunner().invoke(app, ["link", "--out", str(tmp_path / "link.json")])
        assert told.exit_code == 1
        assert "2 CUDA devices are needed, and 1 found" in told.stderr


class TestThroughGloo:
    """What a pair of processes does, each with a collective library below it."""

    def test_a_point_is_executed_and_can_be_predicted(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        profile = small_profile("tiny", name="tiny", provenance={"device": "NVIDIA H200"})
        (tmp_path / "profiles").mkdir()
        (tmp_path / "profiles" / "tiny.json").write_text(profile_text(profile), encoding="utf-8")
        file = written(tmp_path / "points.yaml", TINY)
        out, profiles = str(tmp_path / "out"), str(tmp_path / "profiles")
        done = CliRunner().invoke(
            app, ["run", str(file), "--device", "cpu", "--out", out, "--profiles", profiles, "--repeats", "1"]
        )
        told = capfd.readouterr()
        assert (done.exit_code, told.err) == (0, "")
        assert told.out.startswith("tp2-tiny async: ")
        (path,) = (tmp_path / "out").iterdir()
        point = json.loads(path.read_text(encoding="utf-8"))
        assert point["scenario"]["tensor_parallel"] == 2
        for result in point["measured"].values():
            assert result["counts"]["output_tokens"] == 4 * 6
            assert set(result["stage_ms"]) >= set(HOST_PHASES) - {"wait", "stream_wait"}
        facts = point["provenance"]["measured"]
        assert facts["devices"] == len(facts["rank_host_speeds"]) == 2
        assert facts["host_speed"] == min(facts["rank_host_speeds"]) > 0

        predicting = CliRunner().invoke(app, ["predict", out, "--profiles", profiles])
        assert predicting.exit_code == 0, predicting.output
        predicted = json.loads(path.read_text(encoding="utf-8"))
        assert predicted["measured"] == point["measured"]
        assert set(predicted["error"]) == {"async"}
        assert predicted["provenance"]["predicted"]["transfer"]["tensor_parallel"] == 2


@pytest.mark.gpu
class TestOnGpus:
    def test_a_group_of_one_generates_the_tokens_of_the_whole_model_in_graphs(self) -> None:
        def made(share: Share) -> Decoder:
            of = Decoder(
                MODELS["tiny"], device="cuda", dtype=torch.float32, seed=7, num_kv_blocks=32, max_num_seqs=4,
                max_num_batched_tokens=48, max_model_len=100, graph_sizes=(1, 2), share=share,
            )  # fmt: skip
            of.warm_up()
            return of

        whole, shard = made(WHOLE), made(Shard(0, 1, lambda _: None))
        for schedule in ("sync", "async"):
            assert tokens(shard, schedule, graphs=True) == tokens(whole, schedule)

    def test_a_pair_generates_the_tokens_of_the_whole_model(self) -> None:
        if torch.cuda.device_count() < 2:
            pytest.skip("one CUDA device")
        told = CliRunner().invoke(app, ["check", "--seconds", "120"])
        assert told.exit_code == 0, told.output
