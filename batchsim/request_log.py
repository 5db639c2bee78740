"""Keeps what became of each request while a machine, simulated or real, serves it step by step."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from batchsim.batching.continuous import Batch, ContinuousBatcher, Request, Slice
from batchsim.served import MAX_MOMENTS, Series, Served


class Decision(NamedTuple):
    """What a log keeps of a decision: of a batch, and of the batcher when it was made."""

    step: int
    num_seqs: int
    admitting: tuple[Slice, ...]  # the batch's slices if requests were admitted with it
    running: int
    waiting: int
    kv_blocks: int

    @classmethod
    def of(cls, batch: Batch, batcher: ContinuousBatcher) -> Decision:
        admitting, pool = batch.slices if batch.admitted else (), batcher.pool
        return cls(batch.index, batch.num_seqs, admitting, len(batcher.running), batcher.waiting, pool.used)


class RequestLog:
    """Told of every decision and of every update, in order; memory grows with requests and with distinct gaps.

    `token_times` keeps the time of every token, too, by request.
    """

    def __init__(self, *, warm_up_ns: int = 0, token_times: bool = False) -> None:
        self.warm_up_ns = warm_up_ns
        self.token_times: dict[int, list[int]] | None = {} if token_times else None
        self._requests: dict[int, Request] = {}
        self._left: dict[int, int] = {}  # tokens still to be read of each request that has started and not finished
        self._started_ns: dict[int, int] = {}
        self._first_ns: dict[int, int] = {}
        self._last_ns: dict[int, int] = {}
        self._finished_ns: dict[int, int] = {}
        self._gaps: Counter[int] = Counter()
        self._batch_sizes: Counter[int] = Counter()
        self._moments = array("q")
        self._stride = 1

    def scheduled(self, batch: Batch, now_ns: int, batcher: ContinuousBatcher) -> None:
        """`batcher` decided on `batch` at `now_ns`."""
        self.decided(Decision.of(batch, batcher), now_ns)

    def updated(self, batch: Batch, end_ns: int) -> None:
        """The host has read the tokens of `batch`, and told the batcher, by `end_ns`."""
        self.read([piece.request.id for piece in batch.slices if piece.samples], end_ns)

    def decided(self, decision: Decision, now_ns: int) -> None:
        """`scheduled`, by what was noted of it."""
        self._batch_sizes[decision.num_seqs] += 1
        for piece in decision.admitting:
            request = piece.request
            if request.id not in self._requests:
                self._requests[request.id] = request
                self._started_ns[request.id] = now_ns
                self._left[request.id] = request.output_tokens
        if decision.step % self._stride == 0:
            self._note(now_ns, decision.running, decision.waiting, decision.kv_blocks)

    def read(self, requests: Sequence[int], end_ns: int) -> None:
        """`updated`, by the ids of the requests that the batch sampled tokens of."""
        left, first, last = self._left, self._first_ns, self._last_ns
        for request in requests:
            if request not in left:
                continue  # a token that was computed too many
            if request not in first:
                first[request] = end_ns
            elif end_ns > self.warm_up_ns:
                self._gaps[end_ns - last[request]] += 1
            last[request] = end_ns
            if self.token_times is not None:
                self.token_times.setdefault(request, []).append(end_ns)
            left[request] -= 1
            if not left[request]:
                self._finished_ns[request] = end_ns
                del last[request], left[request]

    def idle(self, now_ns: int) -> None:
        """From `now_ns` on there is no request."""
        self._note(now_ns, 0, 0, 0)

    def _note(self, *moment: int) -> None:
        self._moments.extend(moment)
        if len(self._moments) >= 4 * MAX_MOMENTS:
            kept = np.asarray(self._moments).reshape(-1, 4)[::2].ravel()
            self._moments, self._stride = array("q", kept.tobytes()), 2 * self._stride

    def served(self, batcher: ContinuousBatcher, total_ns: int) -> Served:
        """The table of all requests that have arrived."""
        for request in batcher.queued():
            self._requests.setdefault(request.id, request)
        requests = [self._requests[number] for number in sorted(self._requests)]
        gaps = sorted(self._gaps.items())
        sizes = np.zeros(max(self._batch_sizes, default=0) + 1, np.int64)
        for size, count in self._batch_sizes.items():
            sizes[size] = count

        def column(name: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
            return np.array([getattr(request, name) for request in requests], np.int64)

        def times(found: dict[int, int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
            return np.array([found.get(request.id, -1) for request in requests], np.int64)

        return Served(
            arrival_ns=column("arrival_ns"),
            started_ns=times(self._started_ns),
            first_token_ns=times(self._first_ns),
            finished_ns=times(self._finished_ns),
            prompt_tokens=column("prompt_tokens"),
            output_tokens=column("output_tokens"),
            generated=column("generated"),
            cached_tokens=column("cached_tokens"),
            preemptions=column("preemptions"),
            priority=column("priority"),
            replica=np.zeros(len(requests), np.int64),
            itl_ns=np.array([gap for gap, _ in gaps], np.int64),
            itl_count=np.array([count for _, count in gaps], np.int64),
            batch_sizes=sizes,
            series=Series(*np.asarray(self._moments, np.int64).reshape(-1, 4).T),
            kv_blocks=batcher.pool.num_blocks or 0,
            warm_up_ns=self.warm_up_ns,
            total_ns=total_ns,
        )
