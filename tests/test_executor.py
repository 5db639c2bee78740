"""The real machine on the CPU: the same tokens whatever the schedule, equal to a decoder without a cache."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from batchsim.batching.continuous import Batch, ContinuousBatcher, Request
from batchsim.model import MODELS
from batchsim.records import Span
from batchsim.schedules import SCHEDULES
from calibration.executor import Decoder, Execution, Executor, prompt_tokens
from calibration.executor.inputs import InputBuilder
from calibration.executor.reference import greedy

NUM_BLOCKS = 64
# More prompts than run at once; prompts shorter and longer than a page, a query tile and the token budget.
LENGTHS = ((5, 7), (33, 4), (1, 9), (70, 6), (16, 1), (40, 12), (3, 3), (17, 5))


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(
        MODELS["tiny"], device="cpu", dtype=torch.float64, seed=7, num_kv_blocks=NUM_BLOCKS, max_num_seqs=5,
        max_num_batched_tokens=48, max_model_len=100, graph_sizes=(1, 2, 4),
    )  # fmt: skip


def batcher_of(
    requests: Sequence[Request], decoder: Decoder, *, scattered: bool = True, reserve: bool = False
) -> ContinuousBatcher:
    batcher = ContinuousBatcher(
        requests, max_num_seqs=decoder.max_num_seqs, max_num_batched_tokens=decoder.max_num_batched_tokens,
        block_size=decoder.block_size, num_kv_blocks=decoder.num_kv_blocks, reserve=reserve,
    )  # fmt: skip
    if scattered:
        random.Random(0).shuffle(batcher.pool._free)
    return batcher


def requests_of(lengths: Sequence[tuple[int, int]] = LENGTHS) -> list[Request]:
    return [Request(index, prompt, output) for index, (prompt, output) in enumerate(lengths)]


def execute(decoder: Decoder, schedule: str, requests: Sequence[Request], *, reserve: bool = False) -> Execution:
    executor = Executor(decoder, graphs=True)
    return executor.run(SCHEDULES[schedule](), batcher_of(requests, decoder, reserve=reserve), keep_tokens=True)


def expected(decoder: Decoder, lengths: Sequence[tuple[int, int]] = LENGTHS) -> dict[int, list[int]]:
    tokens = {}
    for index, (prompt, output) in enumerate(lengths):
        ids, positions = np.full(prompt, index), np.arange(prompt)
        tokens[index] = greedy(
            decoder, prompt_tokens(decoder.seed, ids, positions, decoder.shape.vocab_size).tolist(), output
        )
    return tokens


@pytest.mark.parametrize("reserve", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tokens_equal_an_uncached_reference(decoder: Decoder, schedule: str, reserve: bool) -> None:
    assert execute(decoder, schedule, requests_of(), reserve=reserve).tokens == expected(decoder)


def test_tokens_do_not_degenerate(decoder: Decoder) -> None:
    """Else the comparison above would say little: outputs differ between requests and within one."""
    tokens = execute(decoder, "sync", requests_of()).tokens
    assert tokens is not None
    assert len({tuple(row[:3]) for row in tokens.values()}) == len(LENGTHS)
    assert len(set(tokens[5])) > 3


@pytest.mark.parametrize(("schedule", "wasted_each"), [("sync", 0), ("async", 1)])
def test_every_request_ends_once_and_async_wastes_one_token_each(
    decoder: Decoder, schedule: str, wasted_each: int
) -> None:
    requests = requests_of()
    batcher = batcher_of(requests, decoder)
    ended: list[int] = []
    update = batcher.update

    def counting(batch: Batch) -> list[Request]:
        done = update(batch)
        ended.extend(request.id for request in done)
        return done

    batcher.update = counting  # type: ignore[method-assign]
    result = Executor(decoder, graphs=False).run(SCHEDULES[schedule](), batcher)
    assert sorted(ended) == list(range(len(LENGTHS)))
    assert result.output_tokens == sum(output for _, output in LENGTHS)
    # A request that ends on its very last batch still has its wasted token: the host learns of the end too late.
    assert result.wasted_tokens == wasted_each * len(LENGTHS)
    assert sorted(batcher.pool._free) == list(range(NUM_BLOCKS))
    assert result.tokens is None


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_host_spans_tile_the_run(decoder: Decoder, schedule: str) -> None:
    seen: list[Span] = []
    executor = Executor(decoder, graphs=False)
    result = executor.run(SCHEDULES[schedule](), batcher_of(requests_of(), decoder), observe=seen.append)
    assert seen == result.spans == sorted(result.spans, key=lambda span: span.start_ns)
    host = [span for span in result.spans if span.lane == "host"]
    edges = [0, *(span.end_ns for span in host)]
    assert edges[:-1] == [span.start_ns for span in host]
    assert edges[-1] == result.total_ns
    for lane, spans in (("compute", 1), ("copy_in", 1), ("copy_out", 1)):
        steps = [span.step for span in result.spans if span.lane == lane]
        assert sorted(steps) == sorted(list(range(result.steps)) * spans)
    stages = {span.stage for span in result.spans if span.lane == "compute"}
    assert stages == {"prefill", "decode"}


def test_copies_are_timed_for_the_first_steps_only(decoder: Decoder) -> None:
    result = Executor(decoder, graphs=False, timed_steps=3).run(SCHEDULES["sync"](), batcher_of(requests_of(), decoder))
    assert {span.step for span in result.spans if span.lane == "copy_in"} == {0, 1, 2}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_cached_prompt_decodes_at_once_and_the_same_each_time(decoder: Decoder, schedule: str) -> None:
    """The calibrator's requests: context in the cache that was never computed, more of them than lines."""
    requests = [Request(index, 20 + index, 4, scheduled=20 + index) for index in range(12)]
    result = execute(decoder, schedule, requests)
    assert result.tokens is not None
    assert [len(result.tokens[index]) for index in range(12)] == [4] * 12
    assert all(span.stage == "decode" for span in result.spans if span.lane == "compute")


def test_on_tokens_sees_what_the_host_reads(decoder: Decoder) -> None:
    seen: dict[int, list[int]] = {}

    def take(ids: np.ndarray, tokens: np.ndarray) -> None:
        for request, token in zip(ids.tolist(), tokens.tolist(), strict=True):
            seen.setdefault(request, []).append(token)

    executor = Executor(decoder, graphs=False)
    executor.run(SCHEDULES["async"](), batcher_of(requests_of(), decoder), on_tokens=take)
    assert seen == expected(decoder)


@pytest.mark.parametrize(
    ("request_", "blocks_before", "message"),
    [
        (Request(0, 90, 20), 0, "max_model_len=100"),
        (Request(0, 4, 4), NUM_BLOCKS, "num_kv_blocks"),
        (Request(0, 60, 4), NUM_BLOCKS - 3, "num_kv_blocks"),  # its second chunk needs one too many
        (Request(0, 14, 9), NUM_BLOCKS - 1, "num_kv_blocks"),  # and here its third token
    ],
)
def test_requests_that_do_not_fit_are_refused(
    decoder: Decoder, request_: Request, blocks_before: int, message: str
) -> None:
    batcher = ContinuousBatcher([request_], max_num_seqs=5, max_num_batched_tokens=48, block_size=16)
    batcher.pool.take(blocks_before)
    with pytest.raises(ValueError, match=message):
        Executor(decoder, graphs=False).run(SCHEDULES["sync"](), batcher)


def test_sizes_that_the_kernels_do_not_handle_are_refused() -> None:
    with pytest.raises(ValueError, match="block_size is 24"):
        Decoder(
            MODELS["tiny"], device="cpu", dtype=torch.float32, seed=0, num_kv_blocks=4, block_size=24, max_num_seqs=1,
            max_num_batched_tokens=8, max_model_len=16,
        )  # fmt: skip


def test_a_line_does_not_pass_tokens_on_to_its_next_owner() -> None:
    """One line, two requests: the wasted token of the first is in flight while the second begins on its line."""
    decoder = Decoder(
        MODELS["tiny"], device="cpu", dtype=torch.float32, seed=3, num_kv_blocks=4, max_num_seqs=1,
        max_num_batched_tokens=8, max_model_len=32,
    )  # fmt: skip
    builder = InputBuilder(decoder)
    batcher = batcher_of([Request(7, 10, 1, scheduled=10), Request(8, 12, 4, scheduled=12)], decoder)
    batches = [batcher.schedule(), batcher.schedule()]
    assert batches[0] and batches[1]
    first = builder.build(batches[0], 0, None)
    wasted = builder.build(batches[1], 1, first)
    assert decoder.buffers.host(1, wasted.geometry).carry.tolist() == [decoder.buffers.carry_index(0)]
    builder.read(first, np.array([5]))
    for request in batcher.update(batches[0]):
        builder.retire(request)
    after = batcher.schedule()
    assert after
    plan = builder.build(after, 0, wasted)
    inputs = decoder.buffers.host(0, plan.geometry)
    own = prompt_tokens(3, np.array([8]), np.array([12]), decoder.shape.vocab_size).tolist()
    assert (inputs.carry.tolist(), inputs.tokens.tolist(), inputs.seq_lens.tolist()) == ([-1], own, [13])
    ids, _ = builder.read(wasted, np.array([9]))
    assert len(ids) == 0
    assert builder.last_token.tolist() == own
