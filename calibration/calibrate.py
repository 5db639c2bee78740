"""Measure one model on one machine and fit a profile.

The executor itself is what is measured: it runs short stretches of the very loops that it will run later, over
a grid of batch sizes, contexts and prompt chunks, sync and async, with and without graphs, interleaved in rounds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from batchsim.files import write_text
from batchsim.model import MODELS, ModelShape
from batchsim.profile import KernelCounts, Profile
from batchsim.schedules import SCHEDULES
from calibration.cells import Cell, plan, read_samples
from calibration.copies import measure_copies
from calibration.device import kv_room_bytes, prepare
from calibration.executor import Decoder, Executor, build
from calibration.fit import fit_profile
from calibration.provenance import MACHINE_KEYS, QuietCore, provenance
from calibration.store import Store

Progress = Callable[[float, str], None]
BLOCK_SIZE = 16

# Batch sizes that are captured as graphs; other batches are padded to the next one.
GRAPH_SIZES = (1, 2, 5, 8, 11, 16, 20, 26, 32, 40, 52, 64, 80, 104, 128, 160, 200, 256)
MAX_CONTEXT = 9216
PREFILL_TOKENS = (320, 512, 768, 1024, 1280, 1536, 1792, 2048, 3072, 4096, 6144, 8192)
ROUNDS = 2
# What has to be the same for a calibration to be resumed.
RESUMABLE = (*MACHINE_KEYS, "torch", "triton")


def calibrate(
    model: str, device: str, out: Path, *, resume: bool = False, keep_samples: bool = False,
    progress: Progress | None = None, rounds: int = ROUNDS,
) -> Profile:  # fmt: skip
    """Measure `model` on `device` (`cuda` or `cpu`), write the profile to `out` and return it.

    What has been measured is kept in `out` with the suffix `.partial` while the calibration runs, so that an
    interrupted one loses nothing; `resume` goes on from there. `keep_samples` keeps it afterwards, too.

    Raises:
        RunError: no such device, or a partial file of another model or machine.
    """
    prepare(device, "calibrate")
    shape = MODELS[model]
    facts = provenance(device, f"batchsim calibrate --device {device} --model {model} --rounds {rounds}")
    settings = model_settings(shape, device)
    cells = cells_of(settings)
    partial = out.with_name(out.name + ".partial")
    store = Store(partial, {"model": model} | {key: facts.get(key) for key in RESUMABLE}, resume=resume)
    executor = executor_of(shape, device, settings)
    executors = {True: executor, False: Executor(executor.decoder, graphs=False)}
    with QuietCore(move=device == "cuda") as core:
        try:
            for fraction, cell in store.pending(cells, rounds):
                if progress is not None:
                    progress(fraction, cell.key)
                batcher = cell.batcher(block_size=BLOCK_SIZE, num_kv_blocks=settings["num_kv_blocks"])
                core.settle()
                spans = executors[cell.graphs].run(SCHEDULES[cell.schedule](), batcher).spans
                store.add(cell, read_samples(spans, cell))
        finally:
            store.save()
    measured = store.measured(cells)
    facts |= {"rounds": rounds, "runs": len(store.runs), "disturbed_runs": sum(store.disturbed())}
    profile = fit_profile(
        measured,
        name=out.stem,
        model=model,
        facts=facts,
        device_memory_bytes=settings["device_memory_bytes"],
        overlaps=device != "cpu",
        kernels=kernel_counts(executor.decoder),
        tile=executor.decoder.prefill_tile,
        copies=measure_copies() if device == "cuda" else [],
    )
    write_text(out, profile_text(profile))
    if not keep_samples:
        partial.unlink(missing_ok=True)
    return profile


def profile_text(profile: Profile) -> str:
    """JSON with a line for each top-level key, and one for each cell."""
    content = profile.model_dump(mode="json")
    cells = ",\n  ".join(json.dumps(cell, separators=(",", ":")) for cell in content.pop("cells"))
    lines = [f" {json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in content.items()]
    return "{\n" + ",\n".join([*lines, f' "cells": [\n  {cells}\n ]']) + "\n}\n"


def kernel_counts(decoder: Decoder) -> KernelCounts:
    """The launches of a forward as the decoder counts them, in the form that a profile keeps."""
    layers = decoder.shape.num_layers
    first, last = 1, 3  # the inputs' kernel; LM head, argmax and stamp
    return KernelCounts(
        first=first,
        layers=layers,
        per_layer=(decoder.kernels_per_forward["decode_whole"] - first - last) // layers,
        last=last,
        split_rows=max((size for size in decoder.graph_sizes if decoder.splits(size) > 1), default=0),
    )


def cells_of(settings: dict[str, Any]) -> list[Cell]:
    """The cells that suit `model_settings`."""
    return plan(
        kv_tokens=settings["num_kv_blocks"] * BLOCK_SIZE - 64 * BLOCK_SIZE,
        sizes=settings["graph_sizes"],
        max_context=settings["max_model_len"] - 256,
        prefill_tokens=settings["prefill_tokens"],
    )


def executor_of(shape: ModelShape, device: str, settings: dict[str, Any]) -> Executor:
    """An executor that can run them."""
    return build(
        shape,
        device,
        num_kv_blocks=settings["num_kv_blocks"],
        block_size=BLOCK_SIZE,
        max_num_seqs=max(settings["graph_sizes"]),
        max_num_batched_tokens=max(settings["prefill_tokens"]),
        max_model_len=settings["max_model_len"],
        graph_sizes=settings["graph_sizes"],
    )


def model_settings(shape: ModelShape, device: str) -> dict[str, Any]:
    """Sizes that suit the model and the device."""
    if device == "cpu":
        return {
            "graph_sizes": (1, 2, 4, 8),
            "prefill_tokens": (64, 128, 256),
            "max_model_len": 1024,
            "num_kv_blocks": 640,
            "device_memory_bytes": 2 << 30,
        }
    tokens = min(int(kv_room_bytes(shape) / shape.kv_bytes_per_token), 1_000_000)
    return {
        "graph_sizes": GRAPH_SIZES,
        "prefill_tokens": PREFILL_TOKENS,
        "max_model_len": MAX_CONTEXT + 256,
        "num_kv_blocks": tokens // BLOCK_SIZE,
        "device_memory_bytes": torch.cuda.mem_get_info()[1],
    }
