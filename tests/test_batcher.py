"""Laws of continuous batching, whatever the requests and whatever the loop around it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchsim.batching.blocks import BlockPool
from batchsim.batching.continuous import (
    Batch,
    ContinuousBatcher,
    Request,
    Slice,
    attended_pairs,
    block_hashes,
    kv_blocks,
)
from tests.requests import uniform_requests

TICK_NS = 10  # from one decision to the next


@dataclass
class Case:
    lengths: list[tuple[int, int]]  # prompt and output tokens
    seqs: int
    budget: int
    block_size: int
    blocks: int | None
    in_flight: int  # batches scheduled before the first of them is read
    options: dict[str, Any]
    arrivals: list[int]
    priorities: list[int]
    families: list[int]  # requests of one family begin with the same tokens
    begun: list[int] = field(default_factory=list)  # so many

    def requests(self) -> list[Request]:
        return [
            Request(i, prompt, output, self.arrivals[i], priority=self.priorities[i], hashes=self.hashes(i))
            for i, (prompt, output) in enumerate(self.lengths)
        ]

    def content(self, i: int, position: int) -> int:
        """A name for the token at a position of request `i`; equal ones stand after equal beginnings."""
        shared = position < min(self.begun[self.families[i]], self.lengths[i][0])
        return 1000 * (self.families[i] if shared else 10 + i) + position

    def hashes(self, i: int) -> list[int]:
        """Of the blocks that the prompt of request `i` fills."""
        filled = self.lengths[i][0] // self.block_size
        return [self.content(i, (block + 1) * self.block_size - 1) for block in range(filled)]

    def need(self, request: Request) -> int:
        """Blocks for prompt, output and the one token that a loop which reads late may waste."""
        return -(-(request.prompt_tokens + request.output_tokens + 1) // self.block_size)

    def rank(self, request: Request) -> tuple[int, int]:
        return (request.priority if self.options["by_priority"] else 0, request.id)

    def batcher(self, requests: list[Request]) -> ContinuousBatcher:
        return ContinuousBatcher(
            requests,
            max_num_seqs=self.seqs,
            max_num_batched_tokens=self.budget,
            block_size=self.block_size,
            num_kv_blocks=self.blocks,
            **self.options,
        )


def some_cases(**fixed: Any) -> st.SearchStrategy[Case]:
    """Cases of all kinds, many of them with preemptions."""
    return cases(**fixed) | cases(tight=True, **({"reserve": False} | fixed))


@st.composite
def cases(draw: st.DrawFn, /, *, tight: bool = False, **fixed: Any) -> Case:
    """Any case whose requests fit, with the options that are `fixed`; `tight`: with hardly more blocks than one needs,
    for several that outgrow them together.

    A request that is preempted must have been read before it is admitted again: the schedules have at most two
    batches in flight. One that is not to be cut must fit the budget with all that it has generated.
    """
    prompts = st.integers(1, 10) if tight else st.integers(1, 60)
    lengths = draw(st.lists(st.tuples(prompts, st.integers(1, 15)), min_size=4 if tight else 1, max_size=14))
    seqs, block_size = draw(st.integers(3 if tight else 1, 6)), draw(st.sampled_from([1, 4] if tight else [1, 4, 16]))
    longest = max(-(-(prompt + output + 1) // block_size) for prompt, output in lengths)
    blocks = draw(st.integers(longest, longest + 3) if tight else st.none() | st.integers(longest, 4 * longest))
    options: dict[str, Any] = {
        name: draw(st.booleans()) for name in ("reserve", "chunked_prefill", "by_priority", "prefix_caching", "closed")
    }
    options["max_concurrency"] = draw(st.none() | st.integers(1, 8))
    options |= fixed
    most = max(prompt + output for prompt, output in lengths)
    many = len(lengths)
    return Case(
        lengths,
        seqs,
        draw(st.integers(seqs, 50)) if options["chunked_prefill"] else most + draw(st.integers(seqs, 20)),
        block_size,
        blocks,
        draw(st.integers(1, 3 if options["reserve"] or blocks is None else 2)),
        options,
        sorted(draw(st.lists(st.integers(0, 40 * TICK_NS), min_size=many, max_size=many) | st.just([0] * many))),
        draw(st.lists(st.integers(0, 2), min_size=many, max_size=many)),
        draw(st.lists(st.integers(0, 2), min_size=many, max_size=many)),
        draw(st.lists(st.integers(0, 60), min_size=3, max_size=3)),
    )


PLAIN: dict[str, Any] = {"by_priority": False, "prefix_caching": False, "closed": False, "max_concurrency": None}


def batches(
    batcher: ContinuousBatcher, in_flight: int, done: list[Request] | None = None
) -> Iterator[tuple[Batch, list[Request]]]:
    """Every batch to the end as it is formed, and the requests then running; read `in_flight - 1` steps late.

    Requests are added to `done` as the batcher calls them complete. Whatever happens, none is lost.
    """
    unread: deque[Batch] = deque()
    now_ns, steps = 0, 0

    def none_is_lost() -> None:
        assert batcher.accepted == batcher.finished + len(batcher.running) + batcher.waiting
        assert batcher.waiting == len(list(batcher.queued()))
        assert batcher.unserved == len(batcher.running) + batcher.waiting

    while batcher.unserved or batcher.next_decision_ns is not None or unread:
        batch = batcher.schedule(now_ns)
        none_is_lost()
        if batch:
            steps += 1
            assert steps < 20_000, "requests preempt one another for ever"
            assert all(piece.request.arrival_ns <= now_ns for piece in batch.slices)
            yield batch, list(batcher.running)
            unread.append(batch)
        elif not unread:
            # Nothing to run, nothing to read: only a later arrival can change that.
            if batcher.next_decision_ns is None or batcher.next_decision_ns <= now_ns:
                return
            now_ns = batcher.next_decision_ns
            continue
        if not batch or len(unread) == in_flight:
            finished = batcher.update(unread.popleft())
            none_is_lost()
            if done is not None:
                done += finished
        now_ns += TICK_NS


@given(some_cases())
def test_every_request_ends_exactly_once_with_all_its_tokens(case: Case) -> None:
    requests = case.requests()
    batcher = case.batcher(requests)
    done: list[Request] = []
    sampled, indices = 0, []
    for batch, _ in batches(batcher, case.in_flight, done):
        sampled += sum(piece.samples for piece in batch.slices)
        indices.append(batch.index)
    assert sorted(request.id for request in done) == [request.id for request in requests]
    assert batcher.finished == batcher.accepted == len(requests)
    assert not batcher.unserved and not batcher.running and not batcher.waiting
    assert batcher.output_tokens == sum(output for _, output in case.lengths)
    assert all(request.generated == request.output_tokens for request in requests)
    # A loop that reads so many steps late computes at most as many tokens too many, each.
    assert sampled == batcher.output_tokens + batcher.wasted_tokens
    assert batcher.wasted_tokens <= (case.in_flight - 1) * len(requests)
    assert indices == list(range(len(indices)))
    assert batcher.preemptions == sum(request.preemptions for request in requests)
    assert batcher.pool.used == 0 and all(not request.blocks for request in requests)


@given(some_cases())
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
        if not case.options["chunked_prefill"]:
            assert all(piece.samples for piece in prefills)  # a prompt is in one slice


@given(some_cases(prefix_caching=False))
def test_every_token_is_computed_in_order_and_once_unless_preempted(case: Case) -> None:
    """A request's slices follow one another: the prompt in chunks, then token by token; after a preemption anew."""
    requests = case.requests()
    cached = dict.fromkeys(range(len(requests)), 0)
    whole = {request.id: request.prompt_tokens for request in requests}  # what is to be computed before it decodes
    sampled: Counter[int] = Counter()
    for batch, _ in batches(case.batcher(requests), case.in_flight):
        for request in batch.preempted:
            cached[request.id] = 0
            whole[request.id] = request.prompt_tokens + sampled[request.id]
        for piece in batch.slices:
            number = piece.request.id
            assert piece.context == cached[number]
            assert piece.decodes == (piece.context >= whole[number])
            assert piece.tokens == 1 if piece.decodes else piece.context + piece.tokens <= whole[number]
            assert piece.samples == (piece.context + piece.tokens >= whole[number])
            cached[number] += piece.tokens
            sampled[number] += piece.samples
    for request in requests:
        # All but the last token that was sampled have been computed with; more only where a loop read late.
        computed = request.prompt_tokens + request.output_tokens - 1
        if cached[request.id]:  # not preempted while its last token was on its way
            assert computed <= cached[request.id] <= computed + case.in_flight - 1
        else:
            assert request.preemptions and sampled[request.id] == request.output_tokens


@given(cases(**PLAIN, reserve=True))
def test_requests_are_admitted_in_the_order_of_their_arrival(case: Case) -> None:
    admitted: list[int] = []
    prefilled: list[int] = []
    for batch, running in batches(case.batcher(case.requests()), case.in_flight):
        new = [request.id for request in running if request.id not in admitted]
        assert len(new) == batch.admitted
        assert not batch.preempted and not batch.grown
        admitted += new
        prefilled += [piece.request.id for piece in batch.slices if piece.samples and not piece.decodes]
    assert admitted == prefilled == list(range(len(case.lengths)))


@given(some_cases())
def test_who_waits_stands_behind_whoever_was_admitted(case: Case) -> None:
    batcher = case.batcher(case.requests())
    before: list[Request] = []
    for batch, running in batches(batcher, case.in_flight):
        new = [request for request in running if request not in before]
        assert len(new) == batch.admitted
        ranks = [case.rank(request) for request in new]
        assert ranks == sorted(ranks)
        if new:
            assert all(ranks[-1] < case.rank(request) for request in batcher.queued())
        before = running


@given(cases(prefix_caching=False, reserve=True))
def test_reserved_blocks_are_conserved_and_no_two_running_requests_share_one(case: Case) -> None:
    requests = case.requests()
    ever: set[int] = set()
    for _, running in batches(case.batcher(requests), case.in_flight):
        held = [block for request in running for block in request.blocks]
        ever.update(held)
        assert len(set(held)) == len(held)
        assert all(len(request.blocks) == case.need(request) for request in running)
        assert all(not request.blocks for request in requests if request.finished)
        if case.blocks is not None:
            assert all(0 <= block < case.blocks for block in held)
    if case.blocks is None:
        # Freed blocks are used again: never more of them than the requests that may run at once can hold.
        assert len(ever) <= case.seqs * max(case.need(request) for request in requests)


@given(some_cases(reserve=False))
def test_a_running_request_holds_the_blocks_that_it_has_filled(case: Case) -> None:
    requests = case.requests()
    batcher = case.batcher(requests)
    pool = batcher.pool
    held_before: dict[int, int] = {}
    for batch, running in batches(batcher, case.in_flight):
        assert all(len(request.blocks) == kv_blocks(request.scheduled, case.block_size) for request in running)
        assert all(not request.blocks for request in requests if request not in running)
        held = {block for request in running for block in request.blocks}
        assert pool.used == len(held)
        assert held.isdisjoint(pool._free) and held.isdisjoint(pool._unused)
        if not case.options["prefix_caching"]:
            assert len(held) == sum(len(request.blocks) for request in running)
        if case.blocks is not None:
            assert len(held) + len(pool._free) + len(pool._unused) == case.blocks
            assert set(range(case.blocks)) == held | set(pool._free) | set(pool._unused)
        # A batch names those that decode and were given a block.
        grew = {
            piece.request.id
            for piece in batch.slices
            if piece.decodes and len(piece.request.blocks) > held_before.get(piece.request.id, 1 << 30)
        }
        assert {request.id for request in batch.grown} == grew
        held_before = {request.id: len(request.blocks) for request in running}


@given(cases(reserve=False, tight=True))
def test_who_stands_last_is_preempted_and_nobody_is_admitted_then(case: Case) -> None:
    batcher = case.batcher(case.requests())
    preempted: Counter[int] = Counter()
    for batch, running in batches(batcher, case.in_flight):
        for victim in batch.preempted:
            preempted[victim.id] += 1
            assert not victim.blocks and victim.scheduled == 0
            assert victim in batcher.queued() and victim not in running
            # So the first of all who ran still runs.
            assert running and all(case.rank(request) < case.rank(victim) for request in running)
            assert victim not in batch.grown and victim not in (piece.request for piece in batch.slices)
        assert not (batch.preempted and batch.admitted)
    assert batcher.preemptions == preempted.total()


def test_the_later_of_two_starts_again_with_what_it_had_generated() -> None:
    """Both fill their last block with the 17th token of a block of 16; then one more is left, for the first."""
    requests = [Request(0, 16, 20), Request(1, 16, 20)]
    batcher = ContinuousBatcher(requests, max_num_seqs=2, max_num_batched_tokens=64, block_size=16, num_kv_blocks=3)
    steps = [
        (
            [(piece.request.id, piece.context, piece.tokens) for piece in batch.slices],
            [request.id for request in batch.grown],
            [request.id for request in batch.preempted],
        )
        for batch, _ in batches(batcher, 1)
    ]
    assert steps[:3] == [
        ([(0, 0, 16), (1, 0, 16)], [], []),
        ([(0, 16, 1)], [0], [1]),
        ([(0, 17, 1)], [], []),  # its 17 tokens need two blocks
    ]
    again = next(i for i, (pieces, _, _) in enumerate(steps) if (1, 0, 17) in pieces)
    assert again == 20  # when request 0 had its 20 tokens
    assert [pieces for pieces, _, _ in steps[again:]] == [[(1, 0, 17)], *([(1, 17 + i, 1)] for i in range(18))]
    assert [request.preemptions for request in requests] == [0, 1]


@given(some_cases())
def test_what_is_attended_to_is_what_was_computed(case: Case) -> None:
    """An oracle of the cache: what the steps write to each block. Nothing is read that another has overwritten."""
    size = case.block_size
    cache: dict[tuple[int, int], int] = {}
    for batch, _ in batches(case.batcher(case.requests()), case.in_flight):
        # In every layer all keys and values of a step are written before they are attended to.
        for piece in batch.slices:
            for position in range(piece.context, piece.context + piece.tokens):
                place = piece.request.blocks[position // size], position % size
                cache[place] = case.content(piece.request.id, position)
        for piece in batch.slices:
            for position in range(piece.context + piece.tokens):
                place = piece.request.blocks[position // size], position % size
                assert cache[place] == case.content(piece.request.id, position)


@given(some_cases(prefix_caching=True))
def test_blocks_are_shared_by_equal_beginnings_only(case: Case) -> None:
    requests = case.requests()
    batcher = case.batcher(requests)
    pool, size = batcher.pool, case.block_size
    computed: Counter[int] = Counter()
    found: dict[int, int] = {}
    for batch, running in batches(batcher, case.in_flight):
        users: Counter[int] = Counter()
        for request in running:
            assert len(set(request.blocks)) == len(request.blocks)
            for place, block in enumerate(request.blocks):
                users[block] += 1
                if block in pool._users:
                    assert pool._hashes[block] == request.hashes[place]
                    assert pool._cached[request.hashes[place]] == block
        # No one shares a block that is not registered, and a registered one counts who holds it.
        assert all(count == pool._users.get(block, 1) for block, count in users.items())
        assert all(pool._users[block] == 0 for block in pool._unused)
        assert set(pool._users) == set(pool._unused) | {block for block in users if block in pool._users}
        for piece in batch.slices:
            found.setdefault(piece.request.id, piece.context)
            if not piece.decodes:
                computed[piece.request.id] += piece.tokens
    for request in requests:
        assert request.cached_tokens == found[request.id]  # when it was first admitted
        assert request.cached_tokens % size == 0 and request.cached_tokens < request.prompt_tokens
        if not request.preemptions:
            assert computed[request.id] == request.prompt_tokens - request.cached_tokens


@given(cases(prefix_caching=True, max_concurrency=1), st.integers(0, 2))
def test_in_an_ample_pool_one_after_another_finds_what_came_before(case: Case, family: int) -> None:
    case.blocks = None
    case.families = [family] * len(case.families)
    requests = case.requests()
    for _ in batches(case.batcher(requests), case.in_flight):
        pass
    longest = 0
    for request in requests:
        known = min(longest, case.begun[family], request.prompt_tokens) // case.block_size * case.block_size
        least = (request.prompt_tokens - 1) // case.block_size * case.block_size
        assert request.cached_tokens == min(known, least)
        longest = max(longest, request.prompt_tokens)


@given(cases(closed=False))
def test_so_many_are_let_in_at_once(case: Case) -> None:
    limit = case.options["max_concurrency"]
    batcher = case.batcher(case.requests())
    for _ in batches(batcher, case.in_flight):
        assert limit is None or batcher.accepted - batcher.finished <= limit


@given(cases(closed=True), st.integers(1, 8))
def test_in_a_closed_loop_one_arrives_as_another_ends(case: Case, limit: int) -> None:
    case.options["max_concurrency"] = limit
    case.arrivals = [0] * len(case.arrivals)
    requests = case.requests()
    batcher = case.batcher(requests)
    arrived = 0
    for step, _ in enumerate(batches(batcher, case.in_flight)):
        assert batcher.accepted - batcher.finished == min(limit, len(requests) - batcher.finished)
        # It arrives when it is let in, not when the run began.
        assert all(request.arrival_ns > 0 for request in requests[arrived : batcher.accepted] if step)
        arrived = batcher.accepted


@given(st.integers(1, 10))
def test_a_pool_evicts_what_was_left_first_and_of_one_request_the_end_first(size: int) -> None:
    pool = BlockPool(2 * size)
    first, second = pool.take(size), pool.take(size)
    for key, block in enumerate((*first, *second)):
        pool.register(key, block)
    pool.give(second)
    pool.give(first)
    assert pool.used == 0 and pool.can_take(2 * size) and not pool.can_take(2 * size, keep=first[:1])
    assert pool.take(2 * size) == [*reversed(second), *reversed(first)]
    assert pool.cached(range(2 * size)) == []


@pytest.mark.parametrize("reserve", [True, False])
def test_a_request_that_never_fits_stops_the_queue_behind_it(reserve: bool) -> None:
    """Nothing is admitted out of order; that requests are left over is for the engine to tell."""
    requests = [Request(0, 4, 2), Request(1, 400, 2), Request(2, 4, 2)]
    batcher = ContinuousBatcher(
        requests, max_num_seqs=3, max_num_batched_tokens=512, block_size=16, num_kv_blocks=4, reserve=reserve
    )
    assert len(list(batches(batcher, 1))) == 2
    assert sorted(request.id for request in batcher.queued()) == [1, 2]
    assert batcher.finished == 1 and batcher.unserved


@pytest.mark.parametrize("reserve", [True, False])
def test_a_cached_prompt_decodes_at_once(reserve: bool) -> None:
    batcher = ContinuousBatcher(
        [Request(0, 32, 3, scheduled=32)], max_num_seqs=1, max_num_batched_tokens=1, num_kv_blocks=3, reserve=reserve
    )
    batch = batcher.schedule()
    assert batch is not None
    assert (batch.slices, batch.prefill_tokens, batch.kv_tokens) == (
        (Slice(batch.slices[0].request, 32, 1),), 0, 33
    )  # fmt: skip
    assert len(batch.slices[0].request.blocks) == 3


@given(st.integers(0, 200), st.integers(1, 200), st.sampled_from([1, 4, 64]))
def test_pairs_are_counted_by_tiles_of_queries(context: int, tokens: int, tile: int) -> None:
    """Each tile attends to all keys up to its last query; tiles of one give the causal mask."""
    ends = [min(first + tile, tokens) for first in range(0, tokens, tile)]
    assert attended_pairs(context, tokens, tile) == sum(tile * (context + end) for end in ends)


@given(st.integers(1, 9), st.integers(0, 9), st.integers(1, 60), st.integers(1, 20))
def test_hashes_are_equal_where_beginnings_are(per_id: int, shared: int, prompt: int, size: int) -> None:
    """Of two prompts that share their first ids, exactly the blocks that end within those are the same."""
    many = -(-prompt // per_id)
    ids = list(range(many))
    others = [number if place < shared else number + 1000 for place, number in enumerate(ids)]
    mine, theirs = (block_hashes(found, per_id, prompt, size) for found in (ids, others))
    assert len(mine) == len(set(mine)) == prompt // size
    same = [a == b for a, b in zip(mine, theirs, strict=True)]
    assert same == [(block + 1) * size <= shared * per_id for block in range(prompt // size)]


def test_uniform_requests_are_numbered_and_equal() -> None:
    assert [(r.id, r.prompt_tokens, r.output_tokens) for r in uniform_requests(3, 7, 9)] == [
        (0, 7, 9), (1, 7, 9), (2, 7, 9),
    ]  # fmt: skip
