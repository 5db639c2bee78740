"""The device that is measured: whether it is there, and how much of it a KV cache may take."""

from __future__ import annotations

import torch

from batchsim.errors import RunError
from batchsim.model import ModelShape


def prepare(device: str, purpose: str) -> None:
    """Make sure that `device` (`cuda` or `cpu`) can be used; `purpose` is what the user wanted of it.

    Raises:
        RunError: there is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RunError(f"no CUDA device was found; {purpose} on a machine with one, or use --device cpu")
    if device == "cpu":
        torch.set_num_threads(1)  # the model is tiny: threads would mostly wait for each other


def kv_room_bytes(shape: ModelShape) -> float:
    """Bytes that a KV cache may take comfortably on the CUDA device, beside weights that are not there yet."""
    free, _ = torch.cuda.mem_get_info()
    return (free - shape.weight_bytes) * 0.8 - (6 << 30)
