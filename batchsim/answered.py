"""What became of each request of dynamic batching: the tables that its metrics, reports and pictures are made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from batchsim.batching.dynamic import DynamicBatch, DynamicBatcher, Requested
from batchsim.records import Span

Int64 = npt.NDArray[np.int64]
Table = npt.NDArray[np.void]

OUTCOMES = ("waiting", "accepted", "refused", "dropped", "served_late")
WAITING, ACCEPTED, REFUSED, DROPPED, SERVED_LATE = range(len(OUTCOMES))

# A request: `left_ns` is when it left the queue (-1: it has not), `batch` the batch that it left it with (-1: none),
# `outcome` an index of OUTCOMES; one that is being served is still WAITING.
REQUEST = np.dtype(
    [
        ("arrival_ns", np.int64), ("left_ns", np.int64), ("tokens", np.int32), ("priority", np.int32),
        ("batch", np.int32), ("outcome", np.int8),
    ]
)  # fmt: skip
# Moments of a batch, in the order in which it comes to them: the decision, the ends of its copy in, its forward and its
# copy out with their starts, and the end of the update that reads its answers. -1: it has not come to that, or it was
# not measured.
MOMENTS = (
    "decided_ns", "copies_in_ns", "copied_in_ns", "computes_ns", "computed_ns", "copies_out_ns", "copied_out_ns",
    "finished_ns",
)  # fmt: skip
BATCH = np.dtype(
    [("size", np.int32), ("padded_len", np.int32), ("instance", np.int32), *((name, np.int64) for name in MOMENTS)],
    align=True,
)
_STARTS = {"copy_in": "copies_in_ns", "compute": "computes_ns", "copy_out": "copies_out_ns"}
_ENDS = {"copy_in": "copied_in_ns", "compute": "computed_ns", "copy_out": "copied_out_ns"}

PARTS = ("e2e", "queue", "host", "copy_in", "device_queue", "compute", "copy_out")


@dataclass(frozen=True, slots=True, eq=False)
class Answered:
    """One run's requests in the order in which they arrived (REQUEST), and its batches (BATCH); nanoseconds.

    `instances_share` says whether the batches of all instances were computed on one device.
    """

    requests: Table
    batches: Table
    warm_up_ns: int
    total_ns: int
    instances_share: bool = True

    @property
    def outcomes(self) -> dict[str, int]:
        """What became of the requests: `arrivals`, which the others add up to; `waiting` only where some still are."""
        found = np.bincount(self.requests["outcome"], minlength=len(OUTCOMES)).tolist()
        named = {"arrivals": sum(found)} | {OUTCOMES[i]: found[i] for i in range(1, len(OUTCOMES))}
        return named | ({"waiting": found[WAITING]} if found[WAITING] else {})

    @property
    def batch_sizes(self) -> Int64:
        """How many batches there were of 0, 1, 2, ... requests."""
        return np.bincount(self.batches["size"])

    def after_warm_up(self) -> slice:
        """The requests that arrived after the warm-up."""
        return slice(int(np.searchsorted(self.requests["arrival_ns"], self.warm_up_ns)), None)

    def finished_ns(self, counted: slice = slice(None)) -> Int64:
        """When each request's answer was read; -1: it was not."""
        batch = self.requests["batch"][counted]
        if not len(self.batches):
            return np.full(len(batch), -1)
        return np.where(batch >= 0, self.batches["finished_ns"][batch], -1)

    def latencies(self, counted: slice = slice(None)) -> dict[str, Int64]:
        """The samples, in nanoseconds, of each latency of PARTS, of the requests that were answered.

        All but `e2e` add up to it. A copy that was not measured took no time, and what it took is the host's.
        """
        requests, batches = self.requests[counted], self.batches
        answered = (requests["outcome"] == ACCEPTED) | (requests["outcome"] == SERVED_LATE)
        batch = requests["batch"][answered]
        arrival = requests["arrival_ns"][answered]
        e2e, queue = batches["finished_ns"][batch] - arrival, requests["left_ns"][answered] - arrival
        parts = self._parts()
        host = e2e - queue
        for each in parts.values():
            host -= each[batch]
        found = {"e2e": e2e, "queue": queue, "host": host} | {name: each[batch] for name, each in parts.items()}
        return {name: found[name] for name in PARTS}

    def _parts(self) -> dict[str, Int64]:
        """Of each batch, the nanoseconds that are not the host's."""
        batches = self.batches
        ready, begins = batches["copied_in_ns"], batches["computes_ns"]
        known = (ready >= 0) & (begins >= 0)
        return {
            "copy_in": ready - batches["copies_in_ns"],
            "device_queue": np.where(known, self._busy_ns(begins) - self._busy_ns(ready), 0),
            "compute": batches["computed_ns"] - begins,
            "copy_out": batches["copied_out_ns"] - batches["copies_out_ns"],
        }

    def _busy_ns(self, moments: Int64) -> Int64:
        """For how long the device that each batch is computed on had been computing by such a moment of the batch."""
        found = np.zeros(len(moments), np.int64)
        devices = np.zeros(len(moments)) if self.instances_share else self.batches["instance"]
        for device in np.unique(devices):
            here = devices == device
            begins, ends = self.batches["computes_ns"][here], self.batches["computed_ns"][here]
            if (np.diff(begins) < 0).any():
                order = np.argsort(begins, kind="stable")
                begins, ends = begins[order], ends[order]
            sums = np.concatenate([[0], np.cumsum(ends - begins)])
            at = np.searchsorted(begins, moments[here], side="right")
            last = np.maximum(at - 1, 0)
            found[here] = np.where(at > 0, sums[last] + np.minimum(moments[here], ends[last]) - begins[last], 0)
        return found


class AnswerLog:
    """Keeps what became of each batch of one instance: an observer of spans that is told of decisions, too."""

    def __init__(self, instance: int = 0) -> None:
        self.instance = instance
        self.requests: list[tuple[int, tuple[Requested, ...]]] = []  # of each batch, after its index
        self.rows: dict[int, dict[str, int]] = {}

    def __call__(self, span: Span) -> None:
        if span.lane == "host":
            if span.step >= 0 and span.stage == "schedule":
                self.rows.setdefault(span.step, {})["decided_ns"] = span.start_ns
            elif span.stage == "update":
                self.rows.setdefault(span.step, {})["finished_ns"] = span.end_ns
        else:
            row = self.rows.setdefault(span.step, {})
            row[_STARTS[span.lane]], row[_ENDS[span.lane]] = span.start_ns, span.end_ns

    def scheduled(self, batch: DynamicBatch, now_ns: int, batcher: Any) -> None:  # noqa: ARG002
        """`batch` was decided on."""
        self.requests.append((batch.index, batch.requests))
        row = self.rows.setdefault(batch.index, {})
        row["size"], row["padded_len"], row["instance"] = batch.num_seqs, batch.padded_len, self.instance

    def updated(self, batch: DynamicBatch, end_ns: int) -> None:
        """The answers of `batch` were read; spans tell when."""

    def idle(self, now_ns: int) -> None:
        """There is nothing to run."""


def answered(
    logs: Sequence[AnswerLog], batcher: DynamicBatcher, *, warm_up_ns: int, total_ns: int, instances_share: bool = True
) -> Answered:
    """The tables of a run whose instances shared `batcher`, from the log of each."""
    rows = {index: row for log in logs for index, row in log.rows.items()}
    batches = np.full(len(rows), -1, BATCH)
    for index, row in rows.items():
        for name, value in row.items():
            batches[name][index] = value
    requests = np.full(batcher.arrivals, -1, REQUEST)

    def note(request: Requested, left_ns: int, outcome: int, batch: int = -1) -> None:
        requests[request.id] = (request.arrival_ns, left_ns, request.tokens, request.priority, batch, outcome)

    for log in logs:
        for index, members in log.requests:
            finished, left_ns = batches["finished_ns"][index] >= 0, int(batches["decided_ns"][index])
            for request in members:
                outcome = (SERVED_LATE if request.late else ACCEPTED) if finished else WAITING
                note(request, left_ns, outcome, index)
    for request in batcher.refused:
        note(request, request.arrival_ns, REFUSED)
    for request in batcher.dropped:
        note(request, request.entered_ns + (batcher.queue_timeout_ns or 0), DROPPED)
    for request in batcher.queued():
        note(request, -1, WAITING)
    return Answered(requests, batches, warm_up_ns, total_ns, instances_share)
