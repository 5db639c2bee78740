"""Serving on the real machine, on the CPU: preemption, prefix caching and arrivals change no token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from batchsim.batching.continuous import ContinuousBatcher, Request, block_hashes
from batchsim.model import MODELS
from batchsim.request_log import RequestLog
from batchsim.schedules import SCHEDULES
from batchsim.served import Served
from calibration.executor import Decoder, Execution, Executor, prompt_tokens
from calibration.executor.buffers import Int64
from calibration.executor.inputs import prompt_ids
from calibration.executor.reference import greedy

# Most outgrow the blocks that they begin with; (47, 3) and (16, 1) hardly.
LENGTHS = ((30, 20), (5, 40), (33, 15), (47, 3), (16, 33), (1, 47), (16, 1), (20, 28))
MS = 1_000_000


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(
        MODELS["tiny"], device="cpu", dtype=torch.float64, seed=7, num_kv_blocks=64, max_num_seqs=5,
        max_num_batched_tokens=50, max_model_len=100, graph_sizes=(1, 2, 4),
    )  # fmt: skip


def requests_of(
    lengths: Sequence[tuple[int, int]] = LENGTHS, *, arrivals: Sequence[int] = (), hashes: Sequence[list[int]] = ()
) -> list[Request]:
    return [
        Request(i, prompt, output, arrivals[i] if arrivals else 0, hashes=hashes[i] if hashes else ())
        for i, (prompt, output) in enumerate(lengths)
    ]


def batcher_of(requests: Sequence[Request], decoder: Decoder, num_kv_blocks: int, **options: Any) -> ContinuousBatcher:
    batcher = ContinuousBatcher(
        requests, max_num_seqs=decoder.max_num_seqs, max_num_batched_tokens=decoder.max_num_batched_tokens,
        block_size=decoder.block_size, num_kv_blocks=num_kv_blocks, **options,
    )  # fmt: skip
    random.Random(num_kv_blocks).shuffle(batcher.pool._free)
    return batcher


def execute(decoder: Decoder, schedule: str, batcher: ContinuousBatcher, log: RequestLog | None = None) -> Execution:
    return Executor(decoder, graphs=False).run(SCHEDULES[schedule](), batcher, keep_tokens=True, log=log)


def reference(decoder: Decoder, requests: Sequence[Request]) -> dict[int, list[int]]:
    tokens = {}
    for request in requests:
        ids = prompt_ids(request, 0, request.prompt_tokens, decoder.block_size)
        prompt = prompt_tokens(decoder.seed, ids, np.arange(request.prompt_tokens), decoder.shape.vocab_size)
        tokens[request.id] = greedy(decoder, prompt.tolist(), request.output_tokens)
    return tokens


@pytest.fixture(scope="module")
def expected(decoder: Decoder) -> dict[int, list[int]]:
    return reference(decoder, requests_of())


@pytest.mark.parametrize("num_kv_blocks", [4, 5, 6, 9])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_preempted_requests_go_on_where_they_were(
    decoder: Decoder, expected: dict[int, list[int]], schedule: str, num_kv_blocks: int
) -> None:
    requests = requests_of()
    batcher = batcher_of(requests, decoder, num_kv_blocks)
    result = execute(decoder, schedule, batcher)
    assert batcher.preemptions > 0
    assert result.tokens == expected
    assert result.output_tokens == sum(output for _, output in LENGTHS)
    # A loop that decides before it has read wastes the token of whoever ends, unless it took away that one's place.
    ended_in_their_place = sum(not request.waits for request in requests)
    assert result.wasted_tokens == (0 if schedule == "sync" else ended_in_their_place)
    assert sorted(batcher.pool._free) == list(range(num_kv_blocks))


# With few at once, more urgent ones are let in later, and take the lines of those that wait to go on.
@pytest.mark.parametrize(("num_kv_blocks", "at_once"), [(6, None), (4, 3), (5, 4), (9, 5)])
@pytest.mark.parametrize("schedule", ["sync", "async"])
def test_priority_changes_who_is_preempted_and_no_token(
    decoder: Decoder, expected: dict[int, list[int]], schedule: str, num_kv_blocks: int, at_once: int | None
) -> None:
    requests = requests_of()
    for request in requests:
        request.priority = -request.id  # the last one is the most urgent
    batcher = batcher_of(requests, decoder, num_kv_blocks, by_priority=True, max_concurrency=at_once)
    assert execute(decoder, schedule, batcher).tokens == expected
    assert batcher.preemptions and not requests[-1].preemptions


@pytest.mark.parametrize("schedule", ["sync", "async"])
def test_prompts_in_one_piece(decoder: Decoder, expected: dict[int, list[int]], schedule: str) -> None:
    batcher = batcher_of(requests_of(), decoder, 7, chunked_prefill=False)
    assert execute(decoder, schedule, batcher).tokens == expected


# Ids of the prompts' tokens, 8 to an id. An id stands for all that comes before it, too.
IDS = ([1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [1, 2, 9, 9], [1, 2, 3, 4, 5, 7], [8, 10, 11, 12], [1, 2, 3, 4])
SHARED_LENGTHS = ((32, 9), (48, 17), (30, 6), (50, 20), (32, 12), (35, 8))


def sharing() -> list[Request]:
    hashes = [block_hashes(ids, 8, prompt, 16) for ids, (prompt, _) in zip(IDS, SHARED_LENGTHS, strict=True)]
    return requests_of(SHARED_LENGTHS, hashes=hashes)


@pytest.mark.parametrize("num_kv_blocks", [5, 8, 64])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_prefix_caching_changes_no_token(decoder: Decoder, schedule: str, num_kv_blocks: int) -> None:
    expected = reference(decoder, sharing())
    for caching in (False, True):
        requests = sharing()
        batcher = batcher_of(requests, decoder, num_kv_blocks, prefix_caching=caching)
        assert execute(decoder, schedule, batcher).tokens == expected
        assert bool(batcher.preemptions) == (num_kv_blocks < 64)
        if not caching:
            assert not any(request.cached_tokens for request in requests)
        elif num_kv_blocks == 64:
            # Of a whole prompt in the cache the last block is computed, to sample from.
            assert [request.cached_tokens for request in requests] == [0, 32, 16, 32, 0, 32]
        else:
            assert any(request.cached_tokens for request in requests)


def test_equal_hashes_are_equal_tokens(decoder: Decoder) -> None:
    requests = sharing()
    ids = [prompt_ids(request, 0, request.prompt_tokens, 16).tolist() for request in requests]
    assert ids[0] == ids[5][:32] == ids[1][:32] == ids[3][:32]
    assert ids[2][:16] == ids[0][:16] and set(ids[2][16:]) == {2}  # 30 tokens fill one block
    assert set(ids[4]).isdisjoint(set().union(*ids[:4]))
    assert set(ids[5][32:]) == {5}
    # A chunk has the ids that the whole has there.
    for request, whole in zip(requests, ids, strict=True):
        for start in range(0, request.prompt_tokens, 7):
            stop = min(start + 19, request.prompt_tokens)
            assert prompt_ids(request, start, stop, 16).tolist() == whole[start:stop]


ARRIVALS = (0, 0, 1 * MS, 2 * MS, 60 * MS, 60 * MS, 600 * MS, 601 * MS)


def check_log(served: Served, result: Execution, reads: Sequence[Int64]) -> None:
    """The table says what the spans and the tokens say that were told apart from it."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    gaps: list[int] = []
    updates = [span for span in result.spans if span.stage == "update"]
    for span, ids in zip(updates, reads, strict=True):
        for request in ids.tolist():
            gaps += [span.end_ns - last[request]] if request in last else []
            first.setdefault(request, span.end_ns)
            last[request] = span.end_ns
    assert served.first_token_ns.tolist() == [first[i] for i in range(len(first))]
    assert served.finished_ns.tolist() == [last[i] for i in range(len(last))]
    assert sorted(gaps) == np.repeat(served.itl_ns, served.itl_count).tolist()
    assert served.batch_sizes.sum() == result.steps
    assert served.generated.tolist() == served.output_tokens.tolist()
    decisions = [span.start_ns for span in result.spans if span.stage == "schedule" and span.step >= 0]
    assert set(served.started_ns.tolist()) <= set(decisions)
    idle = [span.start_ns for span in result.spans if span.stage == "no_requests"]
    assert served.series.time_ns.tolist() == sorted(decisions + idle)
    assert not served.series.running[np.isin(served.series.time_ns, idle)].any()
    assert (served.arrival_ns <= served.started_ns).all()
    assert (served.started_ns < served.first_token_ns).all()
    assert (served.first_token_ns <= served.finished_ns).all()
    assert served.finished_ns.max() <= served.total_ns == result.total_ns


@pytest.mark.parametrize("num_kv_blocks", [5, 64])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_requests_arrive_while_the_loop_runs(
    decoder: Decoder, expected: dict[int, list[int]], schedule: str, num_kv_blocks: int
) -> None:
    requests = requests_of(arrivals=ARRIVALS)
    batcher = batcher_of(requests, decoder, num_kv_blocks)
    log, reads = RequestLog(), []
    result = Executor(decoder, graphs=False).run(
        SCHEDULES[schedule](), batcher, keep_tokens=True, log=log, on_tokens=lambda ids, _: reads.append(ids)
    )
    assert result.tokens == expected
    served = log.served(batcher, result.total_ns)
    assert served.arrival_ns.tolist() == list(ARRIVALS)
    check_log(served, result, reads)
    assert (served.preemptions.sum() > 0) == (num_kv_blocks == 5)
    assert served.series.kv_blocks.max() <= num_kv_blocks == served.kv_blocks
    # The host always does something, and waits only where there is nothing to run.
    host = [span for span in result.spans if span.lane == "host"]
    assert host[0].start_ns == 0 and host[-1].end_ns == result.total_ns
    assert all(a.end_ns == b.start_ns for a, b in pairwise(host))
    idle = [span for span in host if span.stage == "no_requests"]
    assert idle and all(span.step == -1 and span.duration_ns > 0 for span in idle)
    launched = updated = -1
    for span, then in pairwise(host):
        launched = max(launched, span.step)
        updated = span.step if span.stage == "update" else updated
        if span.stage == "no_requests":
            assert launched == updated, "the host waits for requests while a batch is to be read"
            assert then.stage == "schedule" and then.step >= 0
            begins = [i for i, at in enumerate(served.started_ns) if at == span.end_ns]
            # It ends as a request arrives, which starts at once: within a millisecond, where the machine is not busy.
            assert begins and 0 <= span.end_ns - min(ARRIVALS[i] for i in begins) < 100 * MS
            assert not ((served.started_ns < span.end_ns) & (served.finished_ns > span.end_ns)).any()


def test_all_at_once_never_waits(decoder: Decoder) -> None:
    result = execute(decoder, "async", batcher_of(requests_of(), decoder, 64))
    assert "no_requests" not in {span.stage for span in result.spans}


@pytest.mark.parametrize("schedule", ["sync", "async"])
def test_in_a_closed_loop_a_request_arrives_when_it_is_let_in(
    decoder: Decoder, expected: dict[int, list[int]], schedule: str
) -> None:
    batcher = batcher_of(requests_of(), decoder, 64, max_concurrency=2, closed=True)
    log = RequestLog()
    result = execute(decoder, schedule, batcher, log)
    assert result.tokens == expected
    served = log.served(batcher, result.total_ns)
    assert served.arrival_ns.tolist() == served.started_ns.tolist()  # there is a seat for each
    assert (served.series.running <= 2).all()
    ends = np.sort(served.finished_ns)
    # The third begins after the first end, the fourth after the second, and so on.
    assert (served.arrival_ns[2:] >= ends[:-2]).all() and (served.arrival_ns[:2] == 0).all()


def test_a_request_that_never_fits_ends_the_run_unserved(decoder: Decoder) -> None:
    """Also where others are still to arrive behind it: the loop does not wait for what cannot come."""
    requests = requests_of(((40, 2), (70, 2), (4, 2)), arrivals=(0, 0, 3 * MS))
    batcher = batcher_of(requests, decoder, 4, reserve=True, max_concurrency=1)
    assert execute(decoder, "async", batcher).tokens is not None
    assert batcher.finished == 1 and batcher.unserved
