"""The real machine: a Llama-shaped decoder, and an executor that drives the schedules on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from batchsim.model import ModelShape
from calibration.executor.decoder import Decoder
from calibration.executor.decoding import Execution, Executor
from calibration.executor.inputs import prompt_tokens
from calibration.executor.parallel import WHOLE, Share

__all__ = ["Decoder", "Execution", "Executor", "build", "prompt_tokens"]


def build(
    shape: ModelShape, device: str, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int,
    num_kv_blocks: int | None = None, block_size: int = 16, graphs: bool = True, graph_sizes: Sequence[int] = (),
    seed: int = 0, share: Share = WHOLE,
) -> Executor:  # fmt: skip
    """An executor whose kernels are compiled and whose graphs are captured: bfloat16 on a GPU, float32 on the CPU.

    `num_kv_blocks` defaults to what `max_num_seqs` requests of `max_model_len` tokens need. Raises ValueError for a
    shape that the kernels do not handle, torch.OutOfMemoryError if it does not fit.
    """
    decoder = Decoder(
        shape, device=device, dtype=torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32, seed=seed,
        num_kv_blocks=num_kv_blocks or max_num_seqs * -(-max_model_len // block_size), block_size=block_size,
        max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, max_model_len=max_model_len,
        graph_sizes=graph_sizes, share=share,
    )  # fmt: skip
    decoder.warm_up()
    if graphs:
        decoder.capture()
    return Executor(decoder, graphs=graphs)
