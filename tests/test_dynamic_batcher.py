"""The dynamic batcher alone: when a batch goes and of whom, written out moment by moment."""

from __future__ import annotations

from typing import Any

import pytest

from batchsim.batching.dynamic import DynamicBatch, DynamicBatcher, Requested, padded_len


def batcher(*arrivals: int, tokens: int = 1, priorities: tuple[int, ...] = (), **how: Any) -> DynamicBatcher:
    """Up to four requests in a batch; `arrivals` in nanoseconds."""
    ranks = priorities or (0,) * len(arrivals)
    requests = [Requested(i, at, tokens, ranks[i]) for i, at in enumerate(arrivals)]
    return DynamicBatcher(requests, **{"max_batch_size": 4} | how)


def ids(batch: DynamicBatch | None) -> list[int] | None:
    return None if batch is None else [request.id for request in batch.requests]


def test_without_a_delay_all_that_wait_go_at_once() -> None:
    queue = batcher(0, 0, 5, 5, 5, 5, 5)
    assert ids(queue.schedule(0)) == [0, 1]
    assert queue.schedule(1) is None and queue.next_decision_ns == 5
    assert ids(queue.schedule(5)) == [2, 3, 4, 5]
    assert ids(queue.schedule(6)) == [6]
    assert queue.schedule(7) is None and queue.next_decision_ns is None


def test_a_delay_ends_when_the_batch_is_full_or_the_oldest_has_waited_for_it() -> None:
    queue = batcher(0, 3, 20, 21, 22, 23, max_queue_delay_ns=10)
    assert queue.schedule(0) is None and queue.next_decision_ns == 3
    assert queue.schedule(3) is None and queue.next_decision_ns == 10
    assert ids(queue.schedule(10)) == [0, 1]
    assert queue.schedule(22) is None and queue.next_decision_ns == 23
    assert ids(queue.schedule(23)) == [2, 3, 4, 5]


def test_a_preferred_size_goes_as_soon_as_it_is_filled() -> None:
    queue = batcher(0, 1, 2, 30, 30, 30, max_queue_delay_ns=10, preferred_batch_sizes=(2,))
    assert queue.schedule(0) is None
    assert ids(queue.schedule(1)) == [0, 1]
    assert queue.schedule(2) is None
    assert ids(queue.schedule(12)) == [2]
    # Once the oldest has waited, all go.
    assert ids(queue.schedule(40)) == [3, 4, 5]


def test_without_a_delay_a_preferred_size_cuts_what_is_there() -> None:
    queue = batcher(0, 0, 0, preferred_batch_sizes=(2,))
    assert ids(queue.schedule(0)) == [0, 1]
    assert ids(queue.schedule(0)) == [2]


def test_a_full_queue_refuses_each_arrival_by_the_queue_at_its_own_time() -> None:
    # Until 100 the server is busy. 0 and 1 wait; 2 finds both; when 3 comes, both have timed out.
    queue = batcher(1, 2, 3, 20, 21, max_queue_size=2, queue_timeout_ns=10)
    assert ids(queue.schedule(25)) == [3, 4]
    assert [request.id for request in queue.refused] == [2]
    assert [request.id for request in queue.dropped] == [0, 1]
    assert queue.outcomes == {"arrivals": 5, "accepted": 0, "refused": 1, "dropped": 2, "served_late": 0, "waiting": 2}


def test_a_timeout_is_passed_only_by_waiting_longer() -> None:
    queue = batcher(0, 1, queue_timeout_ns=10)
    assert ids(queue.schedule(11)) == [1]
    queue = batcher(0, 1, queue_timeout_ns=10)
    assert ids(queue.schedule(10)) == [0, 1]


def test_late_requests_are_served_after_all_others() -> None:
    queue = batcher(0, 1, 15, 16, max_batch_size=3, queue_timeout_ns=10, late="serve", priorities=(0, 0, 9, 9))
    batch = queue.schedule(16)
    assert ids(batch) == [2, 3, 0]
    assert batch is not None and queue.update(batch) == list(batch.requests)
    assert ids(queue.schedule(16)) == [1]
    assert queue.outcomes["served_late"] == 1 and queue.outcomes["accepted"] == 2


def test_priorities_and_what_protects_the_others() -> None:
    arrivals, ranks = (0, 1, 2, 3), (1, 0, 1, -1)
    queue = batcher(*arrivals, max_batch_size=1, priorities=ranks)
    assert [ids(queue.schedule(10)) for _ in range(4)] == [[3], [1], [0], [2]]
    queue = batcher(*arrivals, max_batch_size=1, priorities=ranks, max_priority_wait_ns=9)
    assert [ids(queue.schedule(10)) for _ in range(4)] == [[0], [3], [1], [2]]


def test_clients_are_held_back() -> None:
    queue = batcher(0, 0, 0, 7, max_batch_size=1, max_concurrency=2)
    first = queue.schedule(0)
    assert ids(first) == [0] and queue.waiting == 1
    second = queue.schedule(1)
    assert ids(second) == [1] and queue.schedule(2) is None and queue.next_decision_ns is None
    assert first is not None and second is not None
    queue.update(first)
    assert ids(third := queue.schedule(10)) == [2]
    assert third is not None and third.requests[0].entered_ns == 10 and third.requests[0].arrival_ns == 0


def test_in_a_closed_loop_a_request_arrives_when_it_is_let_in() -> None:
    queue = batcher(0, 0, max_concurrency=1, closed=True)
    first = queue.schedule(0)
    assert first is not None and ids(first) == [0]
    queue.update(first)
    second = queue.schedule(42)
    assert second is not None and second.requests[0].arrival_ns == 42


@pytest.mark.parametrize(("longest", "padded"), [(0, 64), (1, 64), (64, 64), (65, 128)])
def test_batches_are_padded_to_whole_buckets(longest: int, padded: int) -> None:
    assert padded_len(longest, 64) == padded
    batch = batcher(0, 0, tokens=longest).schedule(0)
    assert batch is not None
    assert (batch.padded_len, batch.num_tokens, batch.kv_tokens) == (padded, 2 * padded, 2 * padded)
