"""How many kernels and other commands each part of a micro-batch launches, as CUDA's profiling interface sees them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch.profiler import ProfilerActivity, profile

from batchsim.errors import RunError
from calibration.training.trainer import Checkpointing, Trainer, random_tokens

PARTS = ("layers", "head", "head_backward", "layers_backward", "optimizer")
# Parts run this far apart, so that their kernels can be told apart by time alone; further where the host hesitates.
APART_S = (0.02, 0.05, 0.1, 0.2)

# By checkpointing and part, [first, later]; the optimiser's under "none".
Counts = dict[str, dict[str, list[int]]]


def count_launches(trainer: Trainer, sequence_length: int) -> Counts:
    """The launches of each part, by checkpointing; on a CPU, where a launch is the computation, one each.

    Raises:
        RunError: the profiler does not show the parts.
    """
    kinds: tuple[Checkpointing, ...] = ("none", "full")
    if trainer.device.type != "cuda":
        return {kind: {part: [1, 1] for part in PARTS} for kind in kinds}
    tokens = random_tokens(1, sequence_length, trainer.model.shape.vocab_size, "cuda")
    found: Counts = {}
    for kind in kinds:
        trainer.checkpointing = kind
        trainer.step([tokens, tokens])
        for apart_s in APART_S:
            groups = groups_of(_moments(trainer, tokens, apart_s), 0.8e6 * apart_s)
            if len(groups) == 2 * (len(PARTS) - 1) + 1:
                break
        else:
            raise RunError(
                f"the profiler shows {len(groups)} groups of kernels, not two micro-batches and an optimiser"
            )
        first, later, optimizer = groups[:4], groups[4:8], groups[8]
        counts = zip(PARTS, (*first, optimizer), (*later, optimizer), strict=True)
        found[kind] = {part: [number, again] for part, number, again in counts}
    trainer.checkpointing = "none"
    return found


def groups_of(moments: Sequence[float], apart: float) -> list[int]:
    """How many of the sorted moments follow one another closer than `apart`, group by group."""
    groups = [1]
    for before, after in pairwise(moments):
        if after - before > apart:
            groups.append(0)
        groups[-1] += 1
    return groups


def _moments(trainer: Trainer, tokens: torch.Tensor, apart_s: float) -> list[float]:
    """When the device began each command of two micro-batches and an optimiser step, microseconds; pauses between."""

    def pause(_: str = "") -> None:
        torch.cuda.synchronize()
        time.sleep(apart_s)

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        pause()
        for _ in range(2):
            loss = trainer.forward(tokens, 2, pause)
            trainer.backward(loss)
            pause()
        trainer.optimizer_step()
        pause()
    events = profiler.events() or []
    return sorted(event.time_range.start for event in events if event.device_type.name == "CUDA")
