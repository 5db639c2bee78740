"""A model that answers batches of requests: its buffers, and a CUDA graph for every batch size and padded length."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from batchsim.model import ConvNetShape, EncoderShape
from calibration.executor.machine import Move
from calibration.services.convnet import ConvNet
from calibration.services.encoder import Encoder

Array = npt.NDArray[Any]
NUM_SLOTS = 2
STAMPS = 2  # int64 words before a slot's answers: the forward's beginning and end, in device nanoseconds


class Network(Protocol):
    """What a model does with a batch. An item is what a request takes of the input buffer."""

    @property
    def item_type(self) -> torch.dtype: ...
    @property
    def splits_lengths(self) -> bool:
        """Whether items of different padded lengths differ."""
        ...

    @property
    def answer_size(self) -> int:
        """Values of an answer."""
        ...

    @property
    def parameters(self) -> int: ...
    @property
    def launches(self) -> tuple[int, int, int]: ...
    def item_size(self, length: int) -> int: ...
    def payload(self, number: int, length: int) -> Array: ...
    def collate(self, items: Array, payloads: Sequence[Array]) -> None: ...
    def forward(self, items: Tensor) -> Tensor: ...


class Service:
    """A network on a device with two slots of pinned and device buffers.

    A batch is padded to the next of `sizes` requests, and its requests to the next of `lengths` tokens. Padding rows
    hold whatever was there before: no row has an effect on another, and what they answer is not read. On a GPU the
    network computes in bfloat16, on the CPU in float32; answers are float32. Weights come from `seed`.

    Raises ValueError for a length that the shape does not allow.
    """

    def __init__(
        self, shape: EncoderShape | ConvNetShape, *, device: str, sizes: Sequence[int], lengths: Sequence[int] = (1,),
        seed: int = 0,
    ) -> None:  # fmt: skip
        self.shape, self.device = shape, torch.device(device)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.network: Network
        if isinstance(shape, EncoderShape):
            if max(lengths) > shape.max_length:
                raise ValueError(f"{shape.name} takes up to {shape.max_length} tokens, not {max(lengths)}")
            self.network = Encoder(shape, device=self.device, dtype=dtype, seed=seed)
        else:
            self.network = ConvNet(shape, device=self.device, dtype=dtype, seed=seed)
        self.sizes, self.lengths = sorted({*sizes}), sorted({*lengths})
        self._stamp = self._stamp_of()
        pin, rows = self.device.type == "cuda", self.sizes[-1]
        elements = rows * self.network.item_size(self.lengths[-1])
        item_type, words = self.network.item_type, STAMPS + -(-rows * self.network.answer_size // 2)
        slots = range(NUM_SLOTS)
        self._host_items = [torch.zeros(elements, dtype=item_type, pin_memory=pin) for _ in slots]
        self._items = [torch.zeros(elements, dtype=item_type, device=self.device) for _ in slots]
        self._results = [torch.zeros(words, dtype=torch.int64, device=self.device) for _ in slots]
        self._host_results = [torch.zeros(words, dtype=torch.int64, pin_memory=pin) for _ in slots]
        self._item_arrays: list[Array] = [tensor.numpy() for tensor in self._host_items]
        self._result_arrays: list[Array] = [tensor.numpy() for tensor in self._host_results]
        self._graphs: dict[tuple[int, int, int], torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    def size(self, num_seqs: int) -> int:
        """The rows that a batch of `num_seqs` requests is padded to."""
        return next(size for size in self.sizes if size >= num_seqs)

    def length(self, padded_len: int) -> int:
        """The tokens that requests of a batch of `padded_len` are padded to: the longest of `lengths` at most."""
        if not self.network.splits_lengths:
            return self.lengths[0]
        return next((length for length in self.lengths if length >= padded_len), self.lengths[-1])

    def host_items(self, slot: int, num_seqs: int, length: int) -> Array:
        """The pinned input buffer of `slot`, a row a request."""
        width = self.network.item_size(length)
        array: Array = self._item_arrays[slot][: num_seqs * width].reshape(num_seqs, width)
        return array

    def copy_in(self, slot: int, num_seqs: int, length: int) -> Move:
        """Destination and source of the copy that brings the requests' items; none of padding rows."""
        count = num_seqs * self.network.item_size(length)
        return self._items[slot][:count], self._host_items[slot][:count]

    def copy_out(self, slot: int, num_seqs: int) -> Move:
        """Destination and source of the copy that brings the stamps and the requests' answers."""
        count = STAMPS + -(-num_seqs * self.network.answer_size // 2)
        return self._host_results[slot][:count], self._results[slot][:count]

    def results(self, slot: int, num_seqs: int) -> tuple[int, int, npt.NDArray[np.float32]]:
        """The stamps and the answers (requests, values) that the last copy out of `slot` brought; a view."""
        array = self._result_arrays[slot]
        answers = array[STAMPS:].view(np.float32)[: num_seqs * self.network.answer_size]
        return int(array[0]), int(array[1]), answers.reshape(num_seqs, -1)

    def forward(self, slot: int, size: int, length: int, *, graph: bool) -> None:
        """Launch a forward of `size` rows of `slot` on the current stream, stamps around it."""
        if not graph or self.device.type != "cuda":
            self._launch(slot, size, length)
            return
        captured = self._graphs.get((slot, size, length))
        if captured is None:
            captured = self._capture(slot, size, length)
        captured.replay()

    def warm_up(self, *, graphs: bool, lengths: Iterable[int] | None = None) -> None:
        """Run, and with `graphs` capture, every size at `lengths` (default: all), so that no run has to."""
        chosen = self.lengths if lengths is None else sorted({self.length(length) for length in lengths})
        if not self.network.splits_lengths:
            chosen = self.lengths[:1]
        with torch.inference_mode():
            for slot in range(NUM_SLOTS):
                for length in chosen:
                    # The largest first, so that the smaller ones find room in the graphs' pool.
                    for size in reversed(self.sizes):
                        self.forward(slot, size, length, graph=graphs)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _launch(self, slot: int, size: int, length: int) -> None:
        results = self._results[slot]
        self._stamp(results)
        items = self._items[slot][: size * self.network.item_size(length)].view(size, -1)
        answers = results[STAMPS:].view(torch.float32)[: size * self.network.answer_size]
        answers.view(size, -1).copy_(self.network.forward(items))
        self._stamp(results[1:])

    def _capture(self, slot: int, size: int, length: int) -> torch.cuda.CUDAGraph:
        # Launching first compiles kernels and sets libraries up, which a capture could not.
        self._launch(slot, size, length)
        torch.cuda.synchronize(self.device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # One pool for all: graphs share it safely because they replay in order on one stream.
        with torch.cuda.graph(graph, pool=self._pool):
            self._launch(slot, size, length)
        self._graphs[slot, size, length] = graph
        return graph

    def _stamp_of(self) -> Callable[[Tensor], None]:
        if self.device.type == "cuda":
            from calibration.executor.kernels import stamp

            return stamp
        return _stamp_now


def _stamp_now(word: Tensor) -> None:
    word[0] = time.perf_counter_ns()
