"""What a batch's inputs are: rows, positions, places in the cache, and where each token comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from batchsim.batching.continuous import Batch, Request, Slice, kv_blocks
from calibration.executor.buffers import Geometry, Inputs, Int32, Int64
from calibration.executor.decoder import Decoder

# Ids from here on stand for the hashes of blocks; those of requests are smaller.
HASHED = 1 << 62


class Plan(NamedTuple):
    """A built batch: its slot and geometry, the tables to copy, and who owns each sampled token."""

    slot: int
    geometry: Geometry
    table_lines: int
    ids: Int64  # request of each sampled token
    lines: Int64  # its line
    ends: Int64  # its position in the request


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


def prompt_ids(request: Request, start: int, stop: int, block_size: int) -> Int64:
    """The ids from which `prompt_tokens` makes a prompt's tokens at positions `[start, stop)`.

    Inside the blocks that the request has hashes of they come from those, so that equal hashes are equal tokens;
    elsewhere they are the request's own.
    """
    ids = np.full(stop - start, request.id, np.int64)
    hashed = min(stop, len(request.hashes) * block_size)
    if start < hashed:
        first = start // block_size
        names = [HASHED | key % HASHED for key in request.hashes[first : kv_blocks(hashed, block_size)]]
        ids[: hashed - start] = np.array(names)[np.arange(start, hashed) // block_size - first]
    return ids


class InputBuilder:
    """Writes batches into the pinned buffers of a decoder, and keeps what the host knows of each running request.

    All per-request state is in arrays indexed by the request's line, so that a step costs a few array operations
    whatever the batch. A line is given back when its request has finished or is preempted; `owner` tells a late
    token of the line's last owner from one of the next. With `preempts` all sampled tokens are kept, because a
    preempted request computes them anew; its token that was still in flight is one of them.
    """

    def __init__(self, decoder: Decoder, *, preempts: bool = False) -> None:
        self.decoder, self.buffers = decoder, decoder.buffers
        seqs = decoder.max_num_seqs
        self.line_of: dict[int, int] = {}
        self.owner = np.full(seqs, -1, np.int64)
        self.last_token = np.zeros(seqs, np.int64)
        self._free = list(range(seqs - 1, -1, -1))
        self._tables = np.zeros((seqs, self.buffers.table_width), np.int32)
        self._held = [0] * seqs  # blocks in each line's table
        self._preempts = preempts
        # Sampled tokens by line and position; written here, so that no page of it is new in a run.
        self._history = np.full((seqs if preempts else 0, decoder.max_model_len), 0, np.int32)
        self._preempted: dict[int, Int32] = {}  # what requests that wait to go on have sampled, by position
        self._stale: list[set[int]] = [set() for _ in self.buffers.host_tables]
        self._carry = np.full(seqs, -1, np.int64)
        self._ordinals = np.arange(max(seqs, decoder.max_num_batched_tokens) + 1)

    def build(self, batch: Batch, slot: int, previous: Plan | None) -> Plan:
        """Write the inputs of `batch` into `slot`. Tokens that `previous` samples are carried over on the device.

        Raises ValueError for a request that does not fit the decoder.
        """
        line_of = self.line_of
        decodes = batch.num_tokens - batch.prefill_tokens
        for request in batch.preempted:
            self._preempt(request)
        for request in batch.grown:
            self._extend_table(request)
        if batch.admitted:
            for piece in batch.slices:
                if piece.request.id not in line_of:
                    self._admit(piece.request, piece.context)
        if batch.prefill_tokens:
            for piece in batch.slices[decodes:]:
                self._extend_table(piece.request)
        table_lines = self._refresh_tables(slot)
        lines = np.array([line_of[piece.request.id] for piece in batch.slices])
        contexts = np.array([piece.context for piece in batch.slices])
        if batch.prefill_tokens:
            return self._build_mixed(batch, slot, previous, table_lines, decodes, lines, contexts)
        geometry = Geometry.decoding(self.decoder.padded(decodes))
        inputs = self.buffers.host(slot, geometry)
        self._write_decodes(inputs, slot, previous, lines, contexts)
        ends = contexts + 1
        inputs.seq_lens[:decodes] = ends
        inputs.lines[:decodes] = lines
        if decodes < geometry.rows:
            self.buffers.pad(inputs, decodes)
        return Plan(slot, geometry, table_lines, self.owner[lines], lines, ends)

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
        inputs.tokens[decodes:] = self._known(prefills, self.owner[lines[seq]], positions)
        inputs.carry[decodes:] = -1
        ends = contexts + counts
        inputs.seq_lens[:] = ends
        inputs.lines[:] = lines
        inputs.starts[:] = starts
        inputs.tiles[:] = np.array(tiles).ravel()
        inputs.sample_rows[:] = sample_rows
        sampled_lines = lines[sampling]
        return Plan(slot, geometry, table_lines, self.owner[sampled_lines], sampled_lines, ends[sampling])

    def read(self, plan: Plan, tokens: Int64) -> tuple[Int64, Int64]:
        """Take in the sampled `tokens` of `plan`; returns request ids and tokens, finished requests left out."""
        alive = self.owner[plan.lines] == plan.ids
        if not alive.all():
            return self._read_late(plan, tokens, alive)
        self.last_token[plan.lines] = tokens
        if self._preempts:
            self._history[plan.lines, plan.ends] = tokens
        return plan.ids, tokens

    def retire(self, request: Request) -> None:
        """Give back the line of a finished request."""
        if self._preempted.pop(request.id, None) is None:
            self._release(request)

    def _read_late(self, plan: Plan, tokens: Int64, alive: npt.NDArray[np.bool_]) -> tuple[Int64, Int64]:
        """Of requests that have no line any more, preempted ones go on with these tokens."""
        lines = plan.lines[alive]
        self.last_token[lines] = tokens[alive]
        if self._preempts:
            self._history[lines, plan.ends[alive]] = tokens[alive]
            for index in np.flatnonzero(~alive).tolist():
                if (history := self._preempted.get(int(plan.ids[index]))) is not None:
                    history[plan.ends[index]] = tokens[index]
                    alive[index] = True
        return plan.ids[alive], tokens[alive]

    def _preempt(self, request: Request) -> None:
        self._preempted[request.id] = self._history[self._release(request)].copy()

    def _release(self, request: Request) -> int:
        line = self.line_of.pop(request.id)
        self.owner[line] = -1
        self._free.append(line)
        return line

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

    def _known(self, prefills: Sequence[Slice], ids: Int64, positions: Int64) -> Int64:
        """The tokens of prefilling slices, rows of requests `ids`: of prompts, and sampled before a preemption."""
        row, stop = 0, 0
        for piece in prefills:
            row, stop = stop, stop + piece.tokens
            if piece.request.hashes:
                end = piece.context + piece.tokens
                ids[row:stop] = prompt_ids(piece.request, piece.context, end, self.decoder.block_size)
        tokens = self._prompt(ids, positions)
        if self._preempts:
            stop = 0
            for piece in prefills:
                stop += piece.tokens
                end = piece.context + piece.tokens
                if (again := min(end - piece.request.prompt_tokens, piece.tokens)) > 0:
                    tokens[stop - again : stop] = self._history[self.line_of[piece.request.id], end - again : end]
        return tokens

    def _prompt(self, ids: Int64, positions: Int64) -> Int64:
        return prompt_tokens(self.decoder.seed, ids, positions, self.decoder.shape.vocab_size)

    def _admit(self, request: Request, context: int) -> None:
        if request.max_tokens > self.decoder.max_model_len:
            raise ValueError(
                f"request {request.id} may grow to {request.max_tokens} tokens; "
                f"the decoder was built with max_model_len={self.decoder.max_model_len}"
            )
        if not self._free:
            raise ValueError(f"more requests run at once than the decoder's max_num_seqs={self.decoder.max_num_seqs}")
        line = self.line_of[request.id] = self._free.pop()
        self.owner[line] = request.id
        self._held[line] = 0
        self._extend_table(request)
        if (history := self._preempted.pop(request.id, None)) is not None:
            self._history[line] = history
        # A request whose whole prompt is cached already continues it with a token that no one sampled.
        self.last_token[line] = self._prompt(np.array([request.id]), np.array([context]))[0]

    def _extend_table(self, request: Request) -> None:
        """Write down the blocks that a request was given since this was last done."""
        line, blocks = self.line_of[request.id], request.blocks
        held, count = self._held[line], len(blocks)
        if held == count:
            return
        fresh = blocks[held:]
        if max(fresh) >= self.decoder.num_kv_blocks:
            raise ValueError(
                f"request {request.id} was given KV blocks beyond the decoder's {self.decoder.num_kv_blocks}; "
                "give the batcher the same num_kv_blocks and block_size"
            )
        self._tables[line, held:count] = fresh
        self._held[line] = count
        for stale in self._stale:
            stale.add(line)

    def _refresh_tables(self, slot: int) -> int:
        stale = self._stale[slot]
        if not stale:
            return 0
        lines = sorted(stale)
        self.buffers.host_tables[slot][lines] = self._tables[lines]
        stale.clear()
        return lines[-1] + 1
