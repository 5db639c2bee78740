"""Laws of continuous batching, whatever the requests and whatever the loop around it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from batchsim.batching.continuous import Batch, ContinuousBatcher, Request, Slice, attended_pairs, uniform_requests


@dataclass
class Case:
    lengths: list[tuple[int, int]]  # prompt and output tokens
    seqs: int
    budget: int
    block_size: int
    blocks: int | None
    in_flight: int  # batches scheduled before the first of them is read

    def requests(self) -> list[Request]:
        return [Request(i, prompt, output) for i, (prompt, output) in enumerate(self.lengths)]

    def need(self, request: Request) -> int:
        """Blocks for prompt, output and the one token that a loop which reads late may waste."""
        return -(-(request.prompt_tokens + request.output_tokens + 1) // self.block_size)

    def batcher(self, requests: list[Request]) -> ContinuousBatcher:
        return ContinuousBatcher(
            requests,
            max_num_seqs=self.seqs,
            max_num_batched_tokens=self.budget,
            block_size=self.block_size,
            num_kv_blocks=self.blocks,
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = draw(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 15)), min_size=1, max_size=14))
    seqs, block_size = draw(st.integers(1, 6)), draw(st.sampled_from([1, 4, 16]))
    longest = max(-(-(prompt + output + 1) // block_size) for prompt, output in lengths)
    blocks = draw(st.none() | st.integers(longest, 4 * longest))
    return Case(lengths, seqs, draw(st.integers(seqs, 50)), block_size, blocks, draw(st.integers(1, 3)))


def batches(
    batcher: ContinuousBatcher, in_flight: int, done: list[Request] | None = None
) -> list[tuple[Batch, list[Request]]]:
    """Every batch to the end, and the requests running when it was formed; read `in_flight - 1` steps late.

    Requests are added to `done` as the batcher calls them complete.
    """
    made: list[tuple[Batch, list[Request]]] = []
    unread: deque[Batch] = deque()
    while (batch := batcher.schedule()) or unread:
        if batch:
            made.append((batch, list(batcher.running)))
            unread.append(batch)
        if not batch or len(unread) == in_flight:
            finished = batcher.update(unread.popleft())
            if done is not None:
                done += finished
    return made


@given(cases())
def test_every_request_ends_exactly_once_with_all_its_tokens(case: Case) -> None:
    requests = case.requests()
    batcher = case.batcher(requests)
    done: list[Request] = []
    made = batches(batcher, case.in_flight, done)
    assert sorted(request.id for request in done) == [request.id for request in requests]
    assert batcher.finished == len(requests) and not batcher.running and not batcher.waiting
    assert batcher.output_tokens == sum(output for _, output in case.lengths)
    assert all(request.generated == request.output_tokens for request in requests)
    # A loop that reads so many steps late computes at most as many tokens too many, each.
    sampled = sum(piece.samples for batch, _ in made for piece in batch.slices)
    assert sampled == batcher.output_tokens + batcher.wasted_tokens
    assert batcher.wasted_tokens <= (case.in_flight - 1) * len(requests)
    assert [batch.index for batch, _ in made] == list(range(len(made)))


@given(cases())
def test_no_batch_exceeds_its_limits(case: Case) -> None:
    for batch, running in batches(case.batcher(case.requests()), case.in_flight):
        assert len(running) <= case.seqs
        assert 0 < batch.num_seqs <= case.seqs
        assert batch.num_tokens <= case.budget
        assert all(piece.tokens > 0 for piece in batch.slices)
        ids = [piece.request.id for piece in batch.slices]
        assert len(set(ids)) == len(ids)
        # What a batch says of itself is what its slices add up to.
        prefills = [piece for piece in batch.slices if not piece.decodes]
        decodes = [piece for piece in batch.slices if piece.decodes]
        assert [*decodes, *prefills] == list(batch.slices)
        assert batch.num_tokens == sum(piece.tokens for piece in batch.slices)
        assert batch.prefill_tokens == sum(piece.tokens for piece in prefills)
        assert batch.kv_tokens == sum(piece.context + piece.tokens for piece in decodes)


@given(cases())
def test_every_token_is_computed_once_and_in_order(case: Case) -> None:
    """A request's slices follow one another: the prompt in chunks, then token by token."""
    requests = case.requests()
    cached = dict.fromkeys(range(len(requests)), 0)
    for batch, _ in batches(case.batcher(requests), case.in_flight):
        for piece in batch.slices:
            prompt = piece.request.prompt_tokens
            assert piece.context == cached[piece.request.id]
            assert piece.tokens == 1 if piece.decodes else piece.context + piece.tokens <= prompt
            assert piece.samples == (piece.context + piece.tokens >= prompt)
            cached[piece.request.id] += piece.tokens
    for request in requests:
        # All but the last token that was sampled have been computed with; more only where a loop read late.
        computed = request.prompt_tokens + request.output_tokens - 1
        assert computed <= cached[request.id] <= computed + case.in_flight - 1


@given(cases())
def test_requests_are_admitted_in_the_order_of_their_arrival(case: Case) -> None:
    admitted: list[int] = []
    prefilled: list[int] = []
    for batch, running in batches(case.batcher(case.requests()), case.in_flight):
        new = [request.id for request in running if request.id not in admitted]
        assert len(new) == batch.admitted
        admitted += new
        prefilled += [piece.request.id for piece in batch.slices if piece.samples and not piece.decodes]
    assert admitted == prefilled == list(range(len(case.lengths)))


@given(cases())
def test_blocks_are_conserved_and_no_two_running_requests_share_one(case: Case) -> None:
    requests = case.requests()
    batcher = case.batcher(requests)
    unread: deque[Batch] = deque()
    ever: set[int] = set()
    while (batch := batcher.schedule()) or unread:
        if batch:
            unread.append(batch)
        if not batch or len(unread) == case.in_flight:
            batcher.update(unread.popleft())
        held = [block for request in batcher.running for block in request.blocks]
        ever.update(held)
        assert len(set(held)) == len(held)
        assert all(len(request.blocks) == case.need(request) for request in batcher.running)
        assert all(not request.blocks for request in requests if request.finished)
        if case.blocks is not None:
            assert all(0 <= block < case.blocks for block in held)
    if case.blocks is None:
        # Freed blocks are used again: never more of them than the requests that may run at once can hold.
        assert len(ever) <= case.seqs * max(case.need(request) for request in requests)


def test_a_request_that_never_fits_stops_the_queue_behind_it() -> None:
    """Nothing is admitted out of order; that requests are left over is for the engine to tell."""
    requests = [Request(0, 4, 2), Request(1, 400, 2), Request(2, 4, 2)]
    batcher = ContinuousBatcher(requests, max_num_seqs=3, max_num_batched_tokens=512, block_size=16, num_kv_blocks=4)
    batches(batcher, 1)
    assert [request.id for request in batcher.waiting] == [1, 2]
    assert batcher.finished == 1


def test_a_cached_prompt_decodes_at_once() -> None:
    batcher = ContinuousBatcher(
        [Request(0, 32, 3, scheduled=32)], max_num_seqs=1, max_num_batched_tokens=1, num_kv_blocks=3
    )
    batch = batcher.schedule()
    assert batch is not None
    assert (batch.slices, batch.prefill_tokens, batch.kv_tokens) == (
        (Slice(batch.slices[0].request, 32, 1),), 0, 33
    )  # fmt: skip


@given(st.integers(0, 200), st.integers(1, 200), st.sampled_from([1, 4, 64]))
def test_pairs_are_counted_by_tiles_of_queries(context: int, tokens: int, tile: int) -> None:
    """Each tile attends to all keys up to its last query; tiles of one give the causal mask."""
    ends = [min(first + tile, tokens) for first in range(0, tokens, tile)]
    assert attended_pairs(context, tokens, tile) == sum(tile * (context + end) for end in ends)


def test_uniform_requests_are_numbered_and_equal() -> None:
    assert [(r.id, r.prompt_tokens, r.output_tokens) for r in uniform_requests(3, 7, 9)] == [
        (0, 7, 9), (1, 7, 9), (2, 7, 9),
    ]  # fmt: skip
