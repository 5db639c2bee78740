"""Continuous batching: every step, each running request contributes one token or one chunk of its prompt.

The same batcher serves the simulator and the real executor. It knows only what a serving loop knows when it
decides: a request counts as finished once `update` has read its last token, so a loop that reads results one
step late schedules one token too many, as transformers' asynchronous batching does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from batchsim.batching.blocks import BlockPool


@dataclass(slots=True)
class Request:
    """One prompt to be continued by `output_tokens` tokens; of two, the one with the lower `priority` goes first.

    `scheduled` counts the tokens whose keys and values are in the cache once every step decided so far has
    ended; `generated` counts the output tokens that the host has read. `prefill_len` tokens are computed before it
    decodes: its prompt, and after a preemption what it had generated, too. `hashes` name the blocks that its prompt
    fills: equal ones hold equal tokens after an equal beginning.
    """

    id: int
    prompt_tokens: int
    output_tokens: int
    arrival_ns: int = 0
    scheduled: int = 0
    generated: int = 0
    blocks: list[int] = field(default_factory=list)
    room: int = 0  # tokens that its blocks hold
    priority: int = 0
    hashes: Sequence[int] = ()
    prefill_len: int = field(init=False)
    cached_tokens: int = 0
    registered: int = 0  # its first blocks that are kept in the prefix cache
    preemptions: int = 0
    waits: bool = False

    def __post_init__(self) -> None:
        self.prefill_len = self.prompt_tokens

    @property
    def max_tokens(self) -> int:
        """Tokens that it may write to the cache."""
        return max_tokens(self.prompt_tokens, self.output_tokens)

    @property
    def finished(self) -> bool:
        return self.generated >= self.output_tokens


@dataclass(slots=True)
class Slice:
    """What one request contributes to a batch: `tokens` new tokens after `context` cached ones.

    Not to be changed; not frozen, because that makes making one three times as slow, and there is one a token.
    """

    request: Request
    context: int
    tokens: int

    @property
    def samples(self) -> bool:
        """Whether this slice ends in a sampled token: it does unless more of the prompt is to come."""
        return self.context + self.tokens >= self.request.prefill_len

    @property
    def decodes(self) -> bool:
        return self.context >= self.request.prefill_len


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work. Decoding slices come first, in the order in which their requests were admitted.

    `kv_tokens` is the number of cached and new tokens that the decoding slices attend to, summed; `grown` are the
    decoding requests that were given another KV block for this step, `preempted` those that lost all of theirs.
    """

    index: int
    slices: tuple[Slice, ...]
    num_tokens: int
    prefill_tokens: int
    kv_tokens: int
    admitted: int
    grown: Sequence[Request] = ()
    preempted: Sequence[Request] = ()

    @property
    def num_seqs(self) -> int:
        return len(self.slices)

    @property
    def stage(self) -> str:
        """The stage that its forward is, as `batchsim.records` calls them."""
        return "prefill" if self.prefill_tokens else "decode"

    def prefill_pairs(self, tile: int) -> int:
        """(query, key) pairs of the prefilling slices, causal, in whole tiles of `tile` queries."""
        return sum(attended_pairs(s.context, s.tokens, tile) for s in self.slices if not s.decodes)

    @property
    def prefill_depth(self) -> int:
        """Keys that the last query of the longest prefilling slice attends to."""
        return max((s.context + s.tokens for s in self.slices if not s.decodes), default=0)


def attended_pairs(context: int, tokens: int, tile: int) -> int:
    """(query, key) pairs that a kernel computes for `tokens` new tokens after `context` cached ones.

    It works on tiles of `tile` queries, each against all keys up to its last query.
    """
    tiles = -(-tokens // tile)
    return tile * ((tiles - 1) * context + tile * tiles * (tiles - 1) // 2 + context + tokens)


class ContinuousBatcher:
    """Decoding requests first, one token each; then prompts, first come, first served, or by priority.

    `requests` come in the order of their arrival. `max_num_seqs` bounds the requests running at once,
    `max_num_batched_tokens` the tokens of one step; without `chunked_prefill` a prompt is computed in one step. KV
    blocks of `block_size` tokens are taken as they are filled; when none is left, the request that came last (or is
    least urgent) is preempted: it loses its blocks, and computes prompt and output anew when its turn comes again.
    With `reserve`, a request's blocks are taken for its whole length when it is admitted, and none is preempted.
    `num_kv_blocks` bounds them (None: as many as are asked for). `prefix_caching` keeps prompts' blocks and computes
    none that is kept. `max_concurrency` holds requests back while so many are not finished; in a closed loop (`closed`)
    one arrives when it is let in.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        block_size: int = 16,
        num_kv_blocks: int | None = None,
        chunked_prefill: bool = True,
        reserve: bool = False,
        by_priority: bool = False,
        prefix_caching: bool = False,
        max_concurrency: int | None = None,
        closed: bool = False,
    ) -> None:
        self._arrivals = iter(requests)
        self._next = next(self._arrivals, None)
        self._queue: list[tuple[int, int, Request]] = []  # a heap
        self.running: list[Request] = []
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.block_size = block_size
        self.pool = BlockPool(num_kv_blocks)
        self.chunked_prefill = chunked_prefill
        self.reserve = reserve
        self.by_priority = by_priority
        self.prefix_caching = prefix_caching
        self.max_concurrency = max_concurrency
        self.closed = closed
        self._steps = 0
        self.accepted = 0
        self.finished = 0
        self.output_tokens = 0
        self.wasted_tokens = 0
        self.preemptions = 0

    @property
    def waiting(self) -> int:
        """Requests that have arrived and are not running."""
        return len(self._queue)

    @property
    def next_decision_ns(self) -> int | None:
        """The earliest later moment at which `schedule` may answer differently: the next arrival, or None: never."""
        return None if self._next is None else self._next.arrival_ns

    @property
    def unserved(self) -> int:
        """Requests that have arrived and are not finished."""
        return self.accepted - self.finished

    @property
    def counts(self) -> dict[str, int]:
        """Requests finished and tokens, as `Totals.result` takes them."""
        return {
            "requests": self.finished,
            "output_tokens": self.output_tokens,
            "wasted_tokens": self.wasted_tokens,
            "preemptions": self.preemptions,
        }

    def queued(self) -> Iterable[Request]:
        """The requests that wait, in no order."""
        return (entry[-1] for entry in self._queue)

    def submit(self, request: Request) -> None:
        """Accept a request."""
        self.accepted += 1
        self._wait(request)

    def schedule(self, now_ns: int = 0) -> Batch | None:
        """The next batch, with what has arrived by now, or None when there is nothing to run."""
        self._arrive(now_ns)
        if not (self.running or self._queue):
            return None
        slices, kv_tokens, grown = self._decode()
        preempted: list[Request] = []
        if not (self.reserve or self._grow(grown, self.max_num_batched_tokens - len(slices))):
            for piece in slices:
                piece.request.scheduled = piece.context
            grown, preempted = self._make_room()
            slices, kv_tokens, _ = self._decode()
        prefills: list[Slice] = []
        budget = self.max_num_batched_tokens - len(slices)
        if len(slices) < len(self.running):
            for request in self.running:
                if request.scheduled < request.prefill_len and budget > 0:
                    budget -= self._prefill(request, budget, prefills)
        admitted = 0
        while self._queue and budget > 0 and len(self.running) < self.max_num_seqs and not preempted:
            request = self._queue[0][-1]
            if not self._admit(request, budget):
                break
            heappop(self._queue)
            request.waits = False
            self.running.append(request)
            admitted += 1
            if request.scheduled < request.prefill_len:
                budget -= self._prefill(request, budget, prefills)
            else:
                # Its prompt is cached (the calibrator's are): it decodes at once.
                slices.append(Slice(request, request.scheduled, 1))
                request.scheduled += 1
                kv_tokens += request.scheduled
                budget -= 1
        if not slices and not prefills:
            return None
        prefill_tokens = self.max_num_batched_tokens - budget - len(slices)
        tokens = len(slices) + prefill_tokens
        everything = (*slices, *prefills)
        batch = Batch(self._steps, everything, tokens, prefill_tokens, kv_tokens, admitted, grown, preempted)
        self._steps += 1
        return batch

    def update(self, batch: Batch) -> list[Request]:
        """Count the tokens that `batch` sampled; retire and return the requests that this completes."""
        done: list[Request] = []
        counted = 0
        for piece in batch.slices:
            request = piece.request
            if piece.context + piece.tokens >= request.prefill_len:  # it sampled
                generated = request.generated
                if generated >= request.output_tokens:
                    self.wasted_tokens += 1
                    continue
                request.generated = generated = generated + 1
                counted += 1
                if generated >= request.output_tokens:
                    done.append(request)
        self.output_tokens += counted
        if done:
            self.running = [request for request in self.running if not request.finished]
            if any(request.waits for request in done):  # preempted while its last token was on its way
                self._queue = [entry for entry in self._queue if not entry[-1].finished]
                heapify(self._queue)
            self.finished += len(done)
            for request in done:
                self.pool.give(request.blocks)
                request.blocks = []
        return done

    def _arrive(self, now_ns: int) -> None:
        """Let in what has arrived."""
        while (request := self._next) is not None and request.arrival_ns <= now_ns:
            if self.max_concurrency is not None and self.unserved >= self.max_concurrency:
                return
            if self.closed:
                request.arrival_ns = now_ns
            self.submit(request)
            self._next = next(self._arrivals, None)

    def _wait(self, request: Request) -> None:
        request.waits = True
        heappush(self._queue, (*self._rank(request), request))

    def _rank(self, request: Request) -> tuple[int, int]:
        """Where a request stands: by priority where that counts, then by arrival."""
        return request.priority if self.by_priority else 0, request.id

    def _decode(self) -> tuple[list[Slice], int, list[Request]]:
        """A token for each decoding request: slices, the tokens that they attend to, and whose blocks are full."""
        slices: list[Slice] = []
        full: list[Request] = []
        kv_tokens = 0
        for request in self.running:
            context = request.scheduled
            if context >= request.prefill_len:
                if context == request.room:
                    full.append(request)
                slices.append(Slice(request, context, 1))
                request.scheduled = context + 1
                kv_tokens += context + 1
        return slices, kv_tokens, full

    def _grow(self, full: list[Request], budget: int) -> bool:
        """Blocks for the requests in `full`, and for prompts that go on, if there are so many."""
        needs = [(request, 1) for request in full]
        if self.max_num_batched_tokens - budget < len(self.running):
            for request in self.running:
                if request.scheduled < request.prefill_len:
                    tokens = min(request.prefill_len - request.scheduled, budget)
                    budget -= tokens
                    after = kv_blocks(request.scheduled + tokens, self.block_size)
                    needs.append((request, after - len(request.blocks)))
        if not self.pool.can_take(sum(need for _, need in needs)):
            return False
        for request, need in needs:
            self._take(request, need)
        return True

    def _take(self, request: Request, count: int) -> None:
        request.blocks += self.pool.take(count)
        request.room = len(request.blocks) * self.block_size

    def _make_room(self) -> tuple[list[Request], list[Request]]:
        """Blocks for the next tokens of all that run, where there are too few: the decoding ones that were given one,
        and those that were preempted for it."""
        grown: list[Request] = []
        preempted: list[Request] = []
        size = self.block_size
        prefilling: list[Request] = []
        for request in tuple(self.running):
            if request.scheduled < request.prefill_len:
                prefilling.append(request)
            elif request.scheduled == request.room and not request.waits:
                while not self.pool.can_take(1):
                    preempted.append(self._preempt())
                    if preempted[-1] is request:
                        break
                else:
                    self._take(request, 1)
                    grown.append(request)
        granted = 0
        for request in prefilling:
            while not request.waits:
                decoding = sum(other.scheduled >= other.prefill_len for other in self.running)
                tokens = min(request.prefill_len - request.scheduled, self.max_num_batched_tokens - decoding - granted)
                need = kv_blocks(request.scheduled + tokens, size) - len(request.blocks)
                if self.pool.can_take(need):
                    self._take(request, need)
                    granted += tokens
                    break
                preempted.append(self._preempt())
        if preempted:
            grown = [request for request in grown if not request.waits]
        return grown, preempted

    def _preempt(self) -> Request:
        """Take the blocks of the request that stands last."""
        victim = max(self.running, key=self._rank)
        self.running.remove(victim)
        self.pool.give(victim.blocks)
        victim.blocks, victim.scheduled = [], 0
        victim.preemptions += 1
        self.preemptions += 1
        self._wait(victim)
        return victim

    def _admit(self, request: Request, budget: int) -> bool:
        """Give a waiting request its first blocks, if they and the tokens that it needs at once are there."""
        size, context = self.block_size, request.scheduled
        if context == 0:
            request.prefill_len = request.prompt_tokens + request.generated
        shared: list[int] = []
        if self.prefix_caching:
            # One token at least has to be computed, to sample the next one.
            shared = self.pool.cached(request.hashes[: (request.prefill_len - 1) // size])
            context = len(shared) * size
        left = max(request.prefill_len - context, 1)
        if left > budget and not self.chunked_prefill:
            return False
        tokens = request.max_tokens if self.reserve else context + min(left, budget)
        need = kv_blocks(tokens, size) - len(shared)
        if not self.pool.can_take(need, keep=shared):
            return False
        if self.prefix_caching:
            self.pool.share(shared)
            request.scheduled, request.registered = context, len(shared)
            if not request.preemptions:
                request.cached_tokens = context
        request.blocks = shared
        self._take(request, need)
        return True

    def _prefill(self, request: Request, budget: int, prefills: list[Slice]) -> int:
        """Add the next chunk of a prompt, as the budget allows, and return its tokens."""
        context = request.scheduled
        tokens = min(request.prefill_len - context, budget)
        prefills.append(Slice(request, context, tokens))
        request.scheduled = context + tokens
        if self.prefix_caching:
            size = self.block_size
            filled = min(request.scheduled // size, len(request.hashes))
            while request.registered < filled:
                i = request.registered
                if not self.pool.register(request.hashes[i], request.blocks[i]):
                    break
                request.registered += 1
        return tokens


def max_tokens(prompt_tokens: int, output_tokens: int) -> int:
    """Tokens that a request may write to the cache: a loop that reads results late computes one too many."""
    return prompt_tokens + output_tokens + 1


def kv_blocks(tokens: int, block_size: int) -> int:
    """Blocks that hold `tokens` tokens of one request."""
    return -(-tokens // block_size)


def block_hashes(ids: Sequence[int], tokens_per_id: int, prompt_tokens: int, block_size: int) -> list[int]:
    """The hashes of the blocks that a prompt fills, from ids of its tokens in groups of `tokens_per_id`.

    Equal ids stand for equal tokens after an equal beginning, so a block is known by the id at its end and by how far
    into that id's tokens it ends.
    """
    filled = min(prompt_tokens, len(ids) * tokens_per_id) // block_size
    lasts = ((block + 1) * block_size - 1 for block in range(filled))
    return [ids[last // tokens_per_id] * tokens_per_id + last % tokens_per_id for last in lasts]
