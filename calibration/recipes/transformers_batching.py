"""transformers' continuous batching, synchronous or asynchronous: time it untraced, then trace a few steady steps.

Record a sync run, ask what async would give, then run async and compare:

python -m calibration.recipes.transformers_batching --mode sync --out sync.json --trace-out sync.trace.json.gz
batchsim whatif sync.trace.json.gz --steady-step-ms X        # X: timed.step_ms_p50 of sync.json
python -m calibration.recipes.transformers_batching --mode async --out async.json

The model is a Llama shape with random weights (the defaults are the 1B one) or, with --model, one of the hub or a
folder. All requests are queued before the first step; decoding is greedy and never stops early. Needs transformers
5.17 and, for --mode async, a CUDA GPU. Phases are those of transformers' own loop: `cb.prepare` (holding `schedule`
and `build_inputs`), `cb.step/h2d_enqueue`, `cb.step/launch`, `cb.step/retrieve`, `cb.update` (holding `wait_tokens`).

Untraced steps come first, in the same process as the traced ones but before them: CUPTI, which a profiler attaches,
may stay attached when it has gone. On an H200 a graph launch then took 0.1 to 0.4 ms, not 0.04, and a synchronous step
10 to 16% longer. Other untraced runs, such as the async one, want a process of their own.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from batchsim.errors import RunError
from batchsim.files import write_text
from calibration.recipes.transformers_hooks import Steps, hook
from calibration.recipes.transformers_model import about, build_model

BLOCK_SIZE = 256


@dataclass(frozen=True)
class Run:
    """One generation: `batch` requests of `prompt_tokens` random tokens, each to be continued by `new_tokens`."""

    mode: str = "sync"
    batch: int = 8
    prompt_tokens: int = 256
    new_tokens: int = 256
    cuda_graph: bool = True
    max_batch_tokens: int = 2048
    profile_at: int = 48
    profile_steps: int = 14
    record_shapes: bool = False
    seed: int = 0

    @property
    def ramp(self) -> int:
        """Steps at either end in which not all requests decode."""
        return math.ceil(self.batch * self.prompt_tokens / max(1, self.max_batch_tokens - self.batch)) + 4

    @property
    def traced_tokens(self) -> int:
        """New tokens a request that a traced generation needs."""
        return self.profile_at + self.profile_steps + self.ramp

    def problem(self, traced: bool) -> str | None:
        """What keeps this run from being made, one sentence, or None."""
        if self.batch >= self.max_batch_tokens:
            return f"--max-batch-tokens must exceed --batch, found {self.max_batch_tokens} and {self.batch}"
        if traced and self.profile_at < self.ramp:
            return f"--profile-at must be at least {self.ramp}, when all requests decode; found {self.profile_at}"
        needed = self.traced_tokens if traced else 2 * self.ramp + 1
        if self.new_tokens < needed:
            return f"--new-tokens must be at least {needed} for steps that are steady, found {self.new_tokens}"
        return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run as the command line says; the report goes to --out or the standard output."""
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    run = Run(**{name: options[name] for name in Run.__dataclass_fields__})
    problem = run.problem(traced=options["trace_out"] is not None)
    if options["heads"] % options["kv_heads"] or options["hidden"] % options["heads"]:
        problem = "--hidden must be a multiple of --heads, and --heads of --kv-heads"
    for name in ("out", "trace_out"):
        if options[name] and options[name].is_dir():
            problem = f"--{name.replace('_', '-')} must be a file, found the folder {options[name]}"
    if problem:
        parser.error(problem)
    try:
        report = _report(options, run)
        text = json.dumps(report, indent=1) + "\n"
        if options["out"]:
            write_text(options["out"], text)
        else:
            sys.stdout.write(text)
    except (ImportError, RunError, RuntimeError, OSError, ValueError) as error:
        # transformers explains at length; its first line says it.
        sys.exit(f"{parser.prog}: {str(error).strip().partition(chr(10))[0] or type(error).__name__}")


def _report(options: dict[str, Any], run: Run) -> dict[str, Any]:
    """What has been run and how long it took: untraced (`timed`), and traced if that was asked for (`profiled`)."""
    trace_out = options["trace_out"]
    if trace_out:
        trace_out.parent.mkdir(parents=True, exist_ok=True)
    model = build_model(options)
    if run.mode == "async" and model.device.type != "cuda":
        raise RunError("asynchronous batching needs a CUDA GPU; choose --mode sync")
    report = {"mode": run.mode, "args": {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}}
    report |= about(model) | generate(model, run)
    if trace_out:
        report["profiled"] = generate(model, run, trace_out)["timed"]
    return report


def generate(model: Any, run: Run, trace_out: Path | None = None) -> dict[str, Any]:
    """Generate once, all requests queued beforehand; with `trace_out`, trace steady steps into it.

    Returns `resolved` (what the manager made of its settings) and `timed`. Raises RuntimeError if transformers'
    loop failed, which it only logs.
    """
    import torch

    chance = random.Random(run.seed)
    vocab = model.config.get_text_config().vocab_size
    prompts = [[chance.randrange(vocab) for _ in range(run.prompt_tokens)] for _ in range(run.batch)]
    manager = _manager(model, run)
    steps = Steps()
    profiler = _profiler(run) if trace_out else None
    hook(manager, steps, profiler, range(run.profile_at, run.profile_at + run.profile_steps))
    manager.add_requests(prompts, max_new_tokens=run.traced_tokens if trace_out else run.new_tokens)
    begin = time.perf_counter_ns()
    manager.start()
    results: dict[str, list[int]] = {}
    try:
        while len(results) < run.batch and manager.is_running():
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                results[result.request_id] = result.generated_tokens
        wall_s = (time.perf_counter_ns() - begin) / 1e9
    finally:
        processor = manager.batch_processor
        manager.stop(block=True, timeout=60)
    error = manager.background_thread_status.fatal_error
    if error is not None or len(results) < run.batch:
        raise RuntimeError(f"continuous batching ended early: {error or 'requests are missing'}") from error
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    report = {"resolved": _resolved(manager, processor), "timed": _timed(steps, run, begin, wall_s, results)}
    if profiler is not None:
        profiler.export_chrome_trace(str(trace_out))
    manager.destroy()
    # The hooks and the graphs are in reference cycles, which hold the cache.
    del manager, processor
    gc.collect()
    torch.cuda.empty_cache()
    return report


def _manager(model: Any, run: Run) -> Any:
    from transformers import ContinuousBatchingConfig, GenerationConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    blocks = math.ceil((run.prompt_tokens + run.new_tokens) / BLOCK_SIZE) + 2
    return model.init_continuous_batching(
        generation_config=GenerationConfig(
            max_new_tokens=run.new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            block_size=BLOCK_SIZE, num_blocks=run.batch * blocks + 8, max_batch_tokens=run.max_batch_tokens,
            use_async_batching=run.mode == "async", use_cuda_graph=run.cuda_graph, seed=run.seed,
        ),
        workload_hints=WorkloadHints(
            max_prompt_length=run.prompt_tokens, max_generated_length=run.new_tokens + 1, num_requests=run.batch
        ),
    )  # fmt: skip


def _profiler(run: Run) -> Any:
    import torch
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    return torch.profiler.profile(activities=activities, record_shapes=run.record_shapes)


def _resolved(manager: Any, processor: Any) -> dict[str, Any]:
    config = manager.continuous_batching_config
    names = ("use_async_batching", "use_cuda_graph", "max_blocks_per_request", "num_blocks", "max_batch_tokens",
             "max_requests_per_batch")  # fmt: skip
    return {name: getattr(config, name) for name in names} | {"attn": processor.config._attn_implementation}


def _timed(steps: Steps, run: Run, begin: int, wall_s: float, results: dict[str, list[int]]) -> dict[str, Any]:
    """A step lasts from the end of the one before to its own end; medians are over the steps in which all decode."""
    step_ms = [(end - start) / 1e6 for start, end in zip([begin, *steps.ends], steps.ends, strict=False)]
    steady = slice(run.ramp, len(step_ms) - run.ramp)
    gpu_ms = [first.elapsed_time(last) for first, last in steps.events]
    tokens = [results[name] for name in sorted(results, key=lambda name: int(name.rpartition("_")[2]))]
    count = sum(len(row) for row in tokens)

    def median(values: list[float]) -> float | None:
        return statistics.median(values[steady]) if values[steady] else None

    return {
        "wall_s": wall_s,
        "tokens": count,
        "tokens_per_s": count / wall_s,
        "steps": len(step_ms),
        "step_ms_mean": statistics.fmean(step_ms),
        "step_ms_p50": median(step_ms),
        "step_ms_p95": sorted(step_ms[steady])[int(0.95 * len(step_ms[steady]))],
        "tokens_sha1": hashlib.sha1(json.dumps(tokens).encode(), usedforsecurity=False).hexdigest(),
        "host_ms_per_step": {name: sum(spent) / len(step_ms) / 1e6 for name, spent in steps.phases.items()},
        "host_ms_p50": {name: median([ns / 1e6 for ns in spent]) for name, spent in steps.phases.items()},
        "gpu_step_ms_p50": median(gpu_ms),
        "step_ms": [round(ms, 4) for ms in step_ms],
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # A sentence without the usage before it.
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m calibration.recipes.transformers_batching", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--mode", choices=("sync", "async"), default=Run.mode, help="transformers' use_async_batching")
    add("--model", help="a model of the hub, or a folder; without it, random weights of this shape:")
    shape = {"layers": 16, "hidden": 2048, "heads": 32, "kv-heads": 8, "intermediate": 8192, "vocab": 128256}
    for name, default in shape.items():
        add(f"--{name}", type=_positive, default=default, metavar="N", help=f"default {default}")
    add("--batch", type=_positive, default=Run.batch, metavar="N", help="requests, all decoding at once")
    add("--prompt-tokens", type=_positive, default=Run.prompt_tokens, metavar="N", help="tokens of each prompt")
    add("--new-tokens", type=_positive, default=Run.new_tokens, metavar="N", help="tokens generated for each")
    add("--cuda-graph", action=argparse.BooleanOptionalAction, default=Run.cuda_graph, help="default: on")
    add("--attention", default="builtin", help="one of transformers, such as flash_attention_2 or sdpa; `builtin`, the"
        " default, needs no package: PyTorch's FlashAttention-2 and a Triton kernel")  # fmt: skip
    add("--max-batch-tokens", type=_positive, default=Run.max_batch_tokens, metavar="N", help="tokens of a step")
    add("--profile-at", type=_positive, default=Run.profile_at, metavar="STEP", help="first traced step")
    add("--profile-steps", type=_positive, default=Run.profile_steps, metavar="N", help="steps traced")
    add("--record-shapes", action="store_true", help="shapes in the trace: recording takes more of the host")
    add("--seed", type=int, default=Run.seed, help="of weights and prompts")
    add("--device", help="cuda or cpu; default: cuda if there is one")
    add("--out", type=Path, help="the report, JSON; default: the standard output")
    add("--trace-out", type=Path, help="also trace, in a second generation: a Chrome trace, *.json.gz")
    return parser


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() and len(text) <= 9 else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1 to 999999999, found {text!r}")
    return number


if __name__ == "__main__":
    main()
