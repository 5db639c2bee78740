"""What no formula knows: what the libraries and the driver take of a device, measured once for each kind of device."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from batchsim.shipped import shipped

Bytes = Annotated[int, Field(ge=0)]


class AttentionKernel(BaseModel):
    """What the backward pass of a fused kernel takes for a moment: bytes for each element of the queries, each row and
    head, and however many there are."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    element: Bytes = 0
    row: Bytes = 0
    fixed: Bytes = 0


class Library(BaseModel):
    """How a device's kernels take memory, and what the process takes beside the allocator.

    Measured by `python -m calibration.memory probe`, fitted by `fit`.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    kind: Literal["memory"] = "memory"
    name: str
    provenance: dict[str, object] = {}
    product_workspace: Bytes = 0
    """Of cuBLAS, for each thread and stream that multiplies matrices; ATen/cuda/CublasHandlePool.cpp asks for it."""
    attention_kernels: dict[str, AttentionKernel] = {}
    """By bytes of an element, and whether heads share keys and values: `2`, `2 grouped`, `4`."""
    composes_grouped_float: bool = False
    """Whether there is no fused attention in float32 for heads that share keys and values."""
    sorts_embeddings: bool = False
    """Whether the gradient of an embedding is summed after sorting the tokens, as on a GPU."""
    pads_channels: Bytes = 0
    """Channels that an image of three is padded to before a convolution, 0 for none."""
    context: Bytes = 0
    """CUDA context, loaded kernels and libraries: what the device lacks beside what the allocator has reserved."""
    graph_kernel: Bytes = 0
    """Each kernel of an instantiated CUDA graph."""

    def attention(self, width: int, grouped: bool) -> AttentionKernel:
        """The kernel for elements of `width` bytes."""
        name = f"{width} grouped" if grouped else f"{width}"
        return self.attention_kernels.get(name) or self.attention_kernels.get(f"{width}") or AttentionKernel()


CPU = Library(name="cpu")


def library_for(device: str) -> Library:
    """What was measured on a device of this name, as torch tells it; of another GPU, what was measured on some GPU."""
    if device == CPU.name:
        return CPU
    known = [Library.model_validate_json(entry.read_text(encoding="utf-8")) for entry in shipped("memory").values()]
    alike = [library for library in known if library.provenance.get("device") == device]
    return (alike or known or [CPU])[0]
