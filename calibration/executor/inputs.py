"""What a batch's inputs are: rows, positions, places in the cache, and where each token comes from."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from batchsim.batching.continuous import Batch, Request, kv_blocks
from calibration.executor.buffers import Geometry, Inputs, Int64
from calibration.executor.decoder import Decoder


class Plan(NamedTuple):
    """A built batch: its slot and geometry, the tables to copy, and who owns each sampled token."""

    slot: int
    geometry: Geometry
    table_lines: int
    ids: Int64  # request of each sampled token
    lines: Int64  # its line


def prompt_tokens(seed: int, request_ids: Int64, positions: Int64, vocab_size: int) -> Int64:
    """The prompt token of each (request, position): a hash (splitmix64's finaliser), the same on every machine."""
    x = request_ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x += positions.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03) + np.uint64(seed % 2**63)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return (x % np.uint64(vocab_size)).astype(np.int64)


class InputBuilder:
    """Writes batches into the pinned buffers of a decoder, and keeps what the host knows of each running request.

    All per-request state is in arrays indexed by the request's line, so that a step costs a few array operations
    whatever the batch. A line is given back when its request has finished; `owner` tells a late token of a
    finished request from one of the line's next owner.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.buffers = decoder, decoder.buffers
        seqs = decoder.max_num_seqs
        self.line_of: dict[int, int] = {}
        self.owner = np.full(seqs, -1, np.int64)
        self.last_token = np.zeros(seqs, np.int64)
        self._free = list(range(seqs - 1, -1, -1))
        self._tables = np.zeros((seqs, self.buffers.table_width), np.int32)
        self._stale: list[set[int]] = [set() for _ in self.buffers.host_tables]
        self._carry = np.full(seqs, -1, np.int64)
        self._ordinals = np.arange(max(seqs, decoder.max_num_batched_tokens) + 1)

    def build(self, batch: Batch, slot: int, previous: Plan | None) -> Plan:
        """Write the inputs of `batch` into `slot`. Tokens that `previous` samples are carried over on the device.

        Raises ValueError for a request that does not fit the decoder.
        """
        if batch.admitted:
            for piece in batch.slices:
                if piece.request.id not in self.line_of:
                    self._admit(piece.request, piece.context)
        table_lines = self._refresh_tables(slot)
        line_of = self.line_of
        lines = np.array([line_of[piece.request.id] for piece in batch.slices])
        contexts = np.array([piece.context for piece in batch.slices])
        decodes = batch.num_tokens - batch.prefill_tokens
        if batch.prefill_tokens:
            return self._build_mixed(batch, slot, previous, table_lines, decodes, lines, contexts)
        geometry = Geometry.decoding(self.decoder.padded(decodes))
        inputs = self.buffers.host(slot, geometry)
        self._write_decodes(inputs, slot, previous, lines, contexts)
        inputs.seq_lens[:decodes] = contexts + 1
        inputs.lines[:decodes] = lines
        if decodes < geometry.rows:
            self.buffers.pad(inputs, decodes)
        return Plan(slot, geometry, table_lines, self.owner[lines], lines)

    def _build_mixed(
        self, batch: Batch, slot: int, previous: Plan | None, table_lines: int, decodes: int, lines: Int64,
        contexts: Int64,
    ) -> Plan:  # fmt: skip
        prefills = batch.slices[decodes:]
        counts = np.array([piece.tokens for piece in batch.slices])
        starts = np.concatenate(([0], np.cumsum(counts)))
        tile = self.decoder.prefill_tile
        tiles = [(seq, first) for seq, piece in enumerate(prefills, decodes) for first in range(0, piece.tokens, tile)]
        sampling = np.array([piece.samples for piece in batch.slices])
        sample_rows = (starts[1:] - 1)[sampling]
        geometry = Geometry(batch.num_tokens, decodes, len(sample_rows), len(prefills), len(tiles))
        inputs = self.buffers.host(slot, geometry)
        if decodes:
            self._write_decodes(inputs, slot, previous, lines[:decodes], contexts[:decodes])
        seq = np.repeat(self._ordinals[decodes : len(counts)], counts[decodes:])
        positions = self._ordinals[decodes : batch.num_tokens] - starts[seq] + contexts[seq]
        inputs.positions[decodes:] = positions
        inputs.slots[decodes:] = self._places(slot, lines[seq], positions)
        inputs.tokens[decodes:] = self._prompt(self.owner[lines[seq]], positions)
        inputs.carry[decodes:] = -1
        inputs.seq_lens[:] = contexts + counts
        inputs.lines[:] = lines
        inputs.starts[:] = starts
        inputs.tiles[:] = np.array(tiles).ravel()
        inputs.sample_rows[:] = sample_rows
        sampled_lines = lines[sampling]
        return Plan(slot, geometry, table_lines, self.owner[sampled_lines], sampled_lines)

    def read(self, plan: Plan, tokens: Int64) -> tuple[Int64, Int64]:
        """Take in the sampled `tokens` of `plan`; returns request ids and tokens, finished requests left out."""
        alive = self.owner[plan.lines] == plan.ids
        if not alive.all():
            ids, tokens = plan.ids[alive], tokens[alive]
            self.last_token[plan.lines[alive]] = tokens
            return ids, tokens
        self.last_token[plan.lines] = tokens
        return plan.ids, tokens

    def retire(self, request: Request) -> None:
        """Give back the line of a finished request."""
        line = self.line_of.pop(request.id)
        self.owner[line] = -1
        self._free.append(line)

    def _write_decodes(self, inputs: Inputs, slot: int, previous: Plan | None, lines: Int64, contexts: Int64) -> None:
        count = len(lines)
        inputs.tokens[:count] = self.last_token[lines]
        inputs.positions[:count] = contexts
        inputs.slots[:count] = self._places(slot, lines, contexts)
        if previous is None:
            inputs.carry[:count] = -1
            return
        first = self.buffers.carry_index(previous.slot)
        alive = self.owner[previous.lines] == previous.ids
        self._carry.fill(-1)
        self._carry[previous.lines] = np.where(alive, self._ordinals[: len(alive)] + first, -1)
        inputs.carry[:count] = self._carry[lines]

    def _places(self, slot: int, lines: Int64, positions: Int64) -> Int64:
        size = self.decoder.block_size
        blocks = self.buffers.host_tables[slot][lines, positions // size]
        places: Int64 = blocks.astype(np.int64) * size + positions % size
        return places

    def _prompt(self, ids: Int64, positions: Int64) -> Int64:
        return prompt_tokens(self.decoder.seed, ids, positions, self.decoder.shape.vocab_size)

    def _admit(self, request: Request, context: int) -> None:
        blocks, width = request.blocks, kv_blocks(self.decoder.max_model_len, self.decoder.block_size)
        if len(blocks) > width or request.max_tokens > self.decoder.max_model_len:
            raise ValueError(
                f"request {request.id} may grow to {request.max_tokens} tokens; "
                f"the decoder was built with max_model_len={self.decoder.max_model_len}"
            )
        if not self._free:
            raise ValueError(f"more requests run at once than the decoder's max_num_seqs={self.decoder.max_num_seqs}")
        if not blocks or max(blocks) >= self.decoder.num_kv_blocks:
            raise ValueError(
                f"request {request.id} was given KV blocks beyond the decoder's {self.decoder.num_kv_blocks}; "
                "give the batcher the same num_kv_blocks and block_size"
            )
        line = self.line_of[request.id] = self._free.pop()
        self.owner[line] = request.id
        self._tables[line, : len(blocks)] = blocks
        for stale in self._stale:
            stale.add(line)
        # A request whose whole prompt is cached already continues it with a token that no one sampled.
        self.last_token[line] = self._prompt(np.array([request.id]), np.array([context]))[0]

    def _refresh_tables(self, slot: int) -> int:
        stale = self._stale[slot]
        if not stale:
            return 0
        lines = sorted(stale)
        self.buffers.host_tables[slot][lines] = self._tables[lines]
        stale.clear()
        return lines[-1] + 1
