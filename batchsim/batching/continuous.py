"""Continuous batching: every step, each running request contributes one token or one chunk of its prompt.

The same batcher serves the simulator and the real executor. It knows only what a serving loop knows when it
decides: a request counts as finished once `update` has read its last token, so a loop that reads results one
step late schedules one token too many, as transformers' asynchronous batching does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Request:
    """One prompt to be continued by `output_tokens` tokens.

    `scheduled` counts the tokens whose keys and values are in the cache once every step decided so far has
    ended; `generated` counts the output tokens that the host has read.
    """

    id: int
    prompt_tokens: int
    output_tokens: int
    arrival_ns: int = 0
    scheduled: int = 0
    generated: int = 0
    blocks: list[int] = field(default_factory=list)

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
        return self.context + self.tokens >= self.request.prompt_tokens

    @property
    def decodes(self) -> bool:
        return self.context >= self.request.prompt_tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work. Decoding slices come first, in the order in which their requests were admitted.

    `kv_tokens` is the number of cached and new tokens that the decoding slices attend to, summed.
    """

    index: int
    slices: tuple[Slice, ...]
    num_tokens: int
    prefill_tokens: int
    kv_tokens: int
    admitted: int

    @property
    def num_seqs(self) -> int:
        return len(self.slices)

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
    """First come, first served, with a token budget and chunked prefill.

    `max_num_seqs` bounds the requests running at once, `max_num_batched_tokens` the tokens of one step. KV
    blocks of `block_size` tokens are reserved for a request's whole length when it is admitted, so that no
    running request is ever preempted; `num_kv_blocks` bounds them (None: as many as are asked for).
    """

    def __init__(
        self,
        requests: Iterable[Request],
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        block_size: int = 16,
        num_kv_blocks: int | None = None,
    ) -> None:
        self.waiting = deque(requests)
        self.running: list[Request] = []
        self.finished = 0
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.block_size = block_size
        self._free: list[int] = [] if num_kv_blocks is None else list(range(num_kv_blocks - 1, -1, -1))
        self._unbounded = num_kv_blocks is None
        self._blocks_made = 0
        self._steps = 0
        self.output_tokens = 0
        self.wasted_tokens = 0

    def schedule(self) -> Batch | None:
        """The next batch, or None when no request is left to run."""
        slices: list[Slice] = []
        unfinished: list[Request] = []
        kv_tokens = 0
        for request in self.running:
            context = request.scheduled
            if context >= request.prompt_tokens:
                slices.append(Slice(request, context, 1))
                request.scheduled = context + 1
                kv_tokens += context + 1
            else:
                unfinished.append(request)
        budget = self.max_num_batched_tokens - len(slices)
        prefills: list[Slice] = []
        for request in unfinished:
            budget -= self._prefill(request, budget, prefills)
        admitted = 0
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            if not self._reserve(request):
                break
            self.running.append(self.waiting.popleft())
            admitted += 1
            if request.scheduled < request.prompt_tokens:
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
        batch = Batch(self._steps, (*slices, *prefills), tokens, prefill_tokens, kv_tokens, admitted)
        self._steps += 1
        return batch

    def update(self, batch: Batch) -> list[Request]:
        """Count the tokens that `batch` sampled; retire and return the requests that this completes."""
        done: list[Request] = []
        counted = 0
        for piece in batch.slices:
            request = piece.request
            if piece.context + piece.tokens >= request.prompt_tokens:  # it sampled
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
            self.finished += len(done)
            for request in done:
                self._free.extend(reversed(request.blocks))
                request.blocks = []
        return done

    def _prefill(self, request: Request, budget: int, prefills: list[Slice]) -> int:
        """Add the next chunk of a prompt, as the budget allows, and return its tokens."""
        tokens = min(request.prompt_tokens - request.scheduled, budget)
        if tokens > 0:
            prefills.append(Slice(request, request.scheduled, tokens))
            request.scheduled += tokens
        return tokens

    def _reserve(self, request: Request) -> bool:
        need = kv_blocks(request.max_tokens, self.block_size)
        if self._unbounded and need > len(self._free):
            fresh = need - len(self._free)
            self._free[:0] = range(self._blocks_made + fresh - 1, self._blocks_made - 1, -1)
            self._blocks_made += fresh
        if need > len(self._free):
            return False
        request.blocks = [self._free.pop() for _ in range(need)]
        return True


def max_tokens(prompt_tokens: int, output_tokens: int) -> int:
    """Tokens that a request may write to the cache: a loop that reads results late computes one too many."""
    return prompt_tokens + output_tokens + 1


def kv_blocks(tokens: int, block_size: int) -> int:
    """Blocks that hold `tokens` tokens of one request."""
    return -(-tokens // block_size)


def uniform_requests(num_prompts: int, prompt_tokens: int, output_tokens: int) -> Sequence[Request]:
    """`num_prompts` equal requests, all present at the start."""
    return [Request(i, prompt_tokens, output_tokens) for i in range(num_prompts)]
