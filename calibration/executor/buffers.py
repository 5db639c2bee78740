"""Input and output buffers: per slot one pinned host buffer and its twin on the device, one copy each way a step.

A slot's inputs are int32 and packed around a fixed point, the beginning of its block tables:

    ... | per-row and per-sequence inputs of this batch | block table of line 0 | line 1 | ...
                                                        ^ fixed

The inputs end at the fixed point, so their addresses depend on the batch's geometry alone, as CUDA graphs need; the
tables follow, so inputs and the tables that changed travel in one copy. A running request keeps its *line* (its row
among the tables) for as long as it runs, and its blocks are reserved when it is admitted: a step that admits
nothing copies no tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

STAMPS = 2  # int64 words before the sampled tokens of a slot: the forward's beginning and end, in device nanoseconds


def aligned(count: int) -> int:
    """`count` rounded up to 16 bytes of int32, so that every field is as well aligned as Triton likes."""
    return -(-count // 4) * 4


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a forward's launches depend on: counts of rows, sequences, query tiles and sampled rows.

    Of the `rows` token rows the first `decodes` are one decoding sequence each; `prefills` sequences share the
    rest, cut into `tiles` query tiles; `samples` rows end in a token.
    """

    rows: int
    decodes: int
    samples: int
    prefills: int = 0
    tiles: int = 0

    @classmethod
    def decoding(cls, size: int) -> Geometry:
        return cls(size, size, size)

    @property
    def seqs(self) -> int:
        return self.decodes + self.prefills

    @property
    def lengths(self) -> tuple[int, ...]:
        """Elements of each field of `Inputs`, in order. Decoding alone needs no starts, tiles or sampled rows."""
        per_row, per_seq = (self.rows,) * 4, (self.seqs,) * 2
        return (*per_row, *per_seq, self.seqs + 1, 2 * self.tiles, self.samples) if self.tiles else per_row + per_seq

    @property
    def input_bytes(self) -> int:
        """Bytes of the copy to the device, block tables apart."""
        return 4 * sum(map(aligned, self.lengths))


class Inputs(NamedTuple):
    """One batch's inputs, as numpy views of the pinned buffer or as tensors on the device; all int32.

    `carry` is a flat index into the sampled tokens of all slots (-1: use `tokens`); `slots` a row's place in the
    paged cache (-1: write nothing); `seq_lens` counts cached and new tokens (0: a padding row); `lines` names the
    block table; `starts` the first row of each sequence and one past the last; `tiles` pairs of (sequence, first
    query of the tile); `sample_rows` the rows whose logits are needed.
    """

    tokens: Any
    carry: Any
    positions: Any
    slots: Any
    seq_lens: Any
    lines: Any
    starts: Any = None
    tiles: Any = None
    sample_rows: Any = None


class Buffers:
    """The buffers of all slots.

    `max_rows` bounds the token rows of a batch, `max_tiles` its query tiles, `table_width` the blocks of a
    request. `sampled` (num_slots, stride) int64 holds each slot's two stamps and then its sampled tokens.
    """

    def __init__(
        self, *, device: torch.device, max_rows: int, max_seqs: int, max_tiles: int, table_width: int,
        num_slots: int = 2,
    ) -> None:  # fmt: skip
        largest = Geometry(max_rows, max_seqs, max_seqs, 0, max_tiles)
        self.tables_at = largest.input_bytes // 4
        self.table_width = aligned(table_width)
        size = self.tables_at + max_seqs * self.table_width
        pin = device.type == "cuda"
        self.stride = STAMPS + aligned(max_seqs)
        self.device_inputs = [torch.zeros(size, dtype=torch.int32, device=device) for _ in range(num_slots)]
        self.host_inputs = [torch.zeros(size, dtype=torch.int32, pin_memory=pin) for _ in range(num_slots)]
        self.sampled = torch.zeros((num_slots, self.stride), dtype=torch.int64, device=device)
        self.host_sampled = [torch.zeros(self.stride, dtype=torch.int64, pin_memory=pin) for _ in range(num_slots)]
        self._host_arrays: list[Int32] = [tensor.numpy() for tensor in self.host_inputs]
        self._sampled_arrays: list[Int64] = [tensor.numpy() for tensor in self.host_sampled]
        self.host_tables: list[Int32] = [a[self.tables_at :].reshape(max_seqs, -1) for a in self._host_arrays]
        self.device_tables = [t[self.tables_at :].view(max_seqs, -1) for t in self.device_inputs]
        self._host_views: dict[tuple[int, Geometry], Inputs] = {}
        self._device_views: dict[tuple[int, Geometry], Inputs] = {}

    def host(self, slot: int, geometry: Geometry) -> Inputs:
        """Numpy views into the pinned inputs of `slot`."""
        return self._carve(self._host_views, self._host_arrays[slot], slot, geometry)

    def device(self, slot: int, geometry: Geometry) -> Inputs:
        """Tensor views into the device inputs of `slot`."""
        return self._carve(self._device_views, self.device_inputs[slot], slot, geometry)

    def copy_in(self, slot: int, geometry: Geometry, table_lines: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Destination and source of the copy that brings `geometry`'s inputs and the first `table_lines` tables."""
        start = self.tables_at - geometry.input_bytes // 4
        stop = self.tables_at + table_lines * self.table_width
        return self.device_inputs[slot][start:stop], self.host_inputs[slot][start:stop]

    def copy_out(self, slot: int, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Destination and source of the copy that brings the stamps and `samples` sampled tokens."""
        return self.host_sampled[slot][: STAMPS + samples], self.sampled[slot, : STAMPS + samples]

    def results(self, slot: int, samples: int) -> tuple[int, int, Int64]:
        """The stamps and the sampled tokens that the last copy out of `slot` brought. The tokens are a view."""
        array = self._sampled_arrays[slot]
        return int(array[0]), int(array[1]), array[STAMPS : STAMPS + samples]

    def carry_index(self, slot: int) -> int:
        """The flat index of the first sampled token of `slot`."""
        return slot * self.stride + STAMPS

    def pad(self, inputs: Inputs, rows: int) -> None:
        """Turn the rows from `rows` on into padding: they attend to nothing and write nothing."""
        inputs.tokens[rows:] = 0
        inputs.carry[rows:] = -1
        inputs.positions[rows:] = 0
        inputs.slots[rows:] = -1
        inputs.seq_lens[rows:] = 0
        inputs.lines[rows:] = 0

    def _carve(self, views: dict[tuple[int, Geometry], Inputs], flat: Any, slot: int, geometry: Geometry) -> Inputs:
        inputs = views.get((slot, geometry))
        if inputs is None:
            at = self.tables_at - geometry.input_bytes // 4
            fields = []
            for length in geometry.lengths:
                fields.append(flat[at : at + length])
                at += aligned(length)
            inputs = Inputs(*fields)
            if not geometry.tiles:  # there are few decoding geometries, but any number of others
                views[slot, geometry] = inputs
        return inputs
