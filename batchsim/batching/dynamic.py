"""Dynamic batching: requests of many clients wait in a queue until a batch of them is worth its while.

The same batcher serves the simulator and the real server, and decides as NVIDIA Triton's dynamic batcher does
(`max_queue_delay_microseconds`, `preferred_batch_size`, priority levels, queue policies with a timeout and a bound).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

Late = Literal["drop", "serve"]


@dataclass(slots=True, eq=False)
class Requested:
    """One request of `tokens` input tokens; of two, the one with the lower `priority` goes first.

    `entered_ns` is when it came to the queue: at its arrival, unless its client held it back. `late`: it waited longer
    than the queue's timeout. `waits`: it is in the queue.
    """

    id: int
    arrival_ns: int
    tokens: int = 1
    priority: int = 0
    entered_ns: int = -1
    late: bool = False
    waits: bool = False


@dataclass(frozen=True, slots=True)
class DynamicBatch:
    """Requests that are computed together, each padded to `padded_len` tokens."""

    index: int
    requests: tuple[Requested, ...]
    padded_len: int

    @property
    def num_seqs(self) -> int:
        return len(self.requests)

    @property
    def admitted(self) -> int:
        return len(self.requests)

    @property
    def num_tokens(self) -> int:
        return len(self.requests) * self.padded_len

    @property
    def kv_tokens(self) -> int:
        return len(self.requests) * self.padded_len

    @property
    def prefill_tokens(self) -> int:
        return 0

    @property
    def stage(self) -> str:
        return "forward"

    def prefill_pairs(self, tile: int) -> int:  # noqa: ARG002
        return 0

    @property
    def prefill_depth(self) -> int:
        return 0


def padded_len(longest: int, bucket: int) -> int:
    """Tokens that each row of a batch has: its longest request's, rounded up to whole buckets, and at least one."""
    return max(-(-longest // bucket), 1) * bucket


class DynamicBatcher:
    """Forms batches of up to `max_batch_size` waiting requests. `requests` come in the order of their arrival.

    When a batch goes: at once, if the queue fills a preferred size, and then of the largest that it fills (without
    `preferred_batch_sizes`: `max_batch_size`); and when the oldest request in the queue has waited for
    `max_queue_delay_ns`, of all that there are up to `max_batch_size`. With a delay of 0 nothing is waited for, and
    preferred sizes still cut what is there.

    Who goes: those that have waited longer than `max_priority_wait_ns`, then by priority, each time the one that came
    first; after all these, those that are late.

    A request that finds `max_queue_size` in the queue, late ones included, is refused. One that has waited longer than
    `queue_timeout_ns` is late: it is dropped at that moment, or served after all that are not. All this happens at its
    own time, whenever `schedule` is called: of what happens at one moment, timeouts that have passed come first, then
    arrivals, then the decision.

    `max_concurrency` holds requests back while so many wait or are being served. One that `schedule` has held back
    comes to the queue when `schedule` next finds room, in a closed loop (`closed`) with that as its arrival.
    """

    def __init__(
        self,
        requests: Iterable[Requested],
        *,
        max_batch_size: int,
        max_queue_delay_ns: int = 0,
        preferred_batch_sizes: Sequence[int] = (),
        queue_timeout_ns: int | None = None,
        late: Late = "drop",
        max_queue_size: int | None = None,
        max_priority_wait_ns: int | None = None,
        length_bucket: int = 64,
        max_concurrency: int | None = None,
        closed: bool = False,
    ) -> None:
        self._arrivals = iter(requests)
        self._next = next(self._arrivals, None)
        self.max_batch_size = max_batch_size
        self.max_queue_delay_ns = max_queue_delay_ns
        self.preferred_batch_sizes = tuple(sorted(preferred_batch_sizes)) or (max_batch_size,)
        self.queue_timeout_ns = queue_timeout_ns
        self.late = late
        self.max_queue_size = max_queue_size
        self.max_priority_wait_ns = max_priority_wait_ns
        self.length_bucket = length_bucket
        self.max_concurrency = max_concurrency
        self.closed = closed
        # Those in time by when they came, and by class; one that has left the queue, or become late, is passed over
        # where it is met.
        self._in_time: deque[Requested] = deque()
        self._classes: dict[int, deque[Requested]] = {}
        self._late: deque[Requested] = deque()
        self._held = False  # whether requests that have arrived are held back
        self._room_ns = 0  # when there was room for them
        self.waiting = 0
        self._in_flight = 0
        self._batches = 0
        self.arrivals = 0
        self.refused: list[Requested] = []
        self.dropped: list[Requested] = []
        self.served_late = 0
        self.finished = 0

    @property
    def unserved(self) -> int:
        """Requests that wait or are being served."""
        return self.waiting + self._in_flight

    @property
    def outcomes(self) -> dict[str, int]:
        """What became of the requests: arrivals are the sum of all others; `waiting`, if any, are still unserved."""
        accepted = self.finished - self.served_late
        found = {
            "arrivals": self.arrivals, "accepted": accepted, "refused": len(self.refused),
            "dropped": len(self.dropped), "served_late": self.served_late,
        }  # fmt: skip
        return found | ({"waiting": self.unserved} if self.unserved else {})

    @property
    def counts(self) -> dict[str, int]:
        """Requests finished, as `Totals.result` takes them."""
        return {"requests": self.finished}

    @property
    def next_decision_ns(self) -> int | None:
        """The earliest later moment at which `schedule` may answer differently, or None: never."""
        moments = [] if self._next is None or self._held else [self._next.arrival_ns]
        if self.waiting:
            moments.append(self._oldest().entered_ns + self.max_queue_delay_ns)
        return min(moments, default=None)

    def queued(self) -> Iterable[Requested]:
        """The requests that wait, in the order in which they came."""
        return (*self._late, *(request for request in self._in_time if request.waits and not request.late))

    def submit(self, request: Requested) -> None:
        """A request arrives now."""
        self.arrivals += 1
        if self.max_queue_size is not None and self.waiting >= self.max_queue_size:
            self.refused.append(request)
            return
        if request.entered_ns < 0:
            request.entered_ns = request.arrival_ns
        request.waits = True
        self.waiting += 1
        self._in_time.append(request)
        self._classes.setdefault(request.priority, deque()).append(request)

    def schedule(self, now_ns: int = 0) -> DynamicBatch | None:
        """The next batch, with what has arrived by now, or None when there is none that goes yet."""
        self._arrive(now_ns)
        if not self.waiting:
            return None
        filled = [size for size in self.preferred_batch_sizes if size <= self.waiting]
        waited = now_ns - self._oldest().entered_ns >= self.max_queue_delay_ns
        if filled and not (waited and self.max_queue_delay_ns):
            count = filled[-1]
        elif waited:
            count = min(self.waiting, self.max_batch_size)
        else:
            return None
        requests = tuple(self._take(now_ns) for _ in range(count))
        self._in_flight += count
        longest = max(request.tokens for request in requests)
        batch = DynamicBatch(self._batches, requests, padded_len(longest, self.length_bucket))
        self._batches += 1
        return batch

    def update(self, batch: DynamicBatch) -> list[Requested]:
        """The results of `batch` were read: all its requests are finished."""
        self._in_flight -= batch.num_seqs
        self.finished += batch.num_seqs
        self.served_late += sum(request.late for request in batch.requests)
        return list(batch.requests)

    def _arrive(self, now_ns: int) -> None:
        """Let arrivals and timeouts up to now happen, each at its time."""
        if self._held:
            self._room_ns = now_ns
        while (request := self._next) is not None and request.arrival_ns <= now_ns:
            if self.max_concurrency is not None and self.unserved >= self.max_concurrency:
                if not self._expire(now_ns):
                    break
                self._room_ns = now_ns
                continue
            request.entered_ns = max(request.arrival_ns, self._room_ns)
            if self.closed:
                request.arrival_ns = request.entered_ns
            self._expire(request.entered_ns)
            self.submit(request)
            self._next = next(self._arrivals, None)
        self._held = request is not None and request.arrival_ns <= now_ns
        self._expire(now_ns)

    def _expire(self, now_ns: int) -> int:
        """Drop or put back the requests that have waited too long by now; how many have left the queue."""
        if self.queue_timeout_ns is None:
            return 0
        before = self.waiting
        while (request := self._first(self._in_time)) and request.entered_ns + self.queue_timeout_ns < now_ns:
            self._in_time.popleft()
            request.late = True
            if self.late == "serve":
                self._late.append(request)
            else:
                request.waits = False
                self.waiting -= 1
                self.dropped.append(request)
        return before - self.waiting

    def _take(self, now_ns: int) -> Requested:
        """Take the request out of the queue whose turn it is."""
        request = self._first(self._in_time)
        if request is None:
            request = self._late.popleft()
        elif self.max_priority_wait_ns is None or request.entered_ns + self.max_priority_wait_ns >= now_ns:
            firsts = (self._first(self._classes[priority]) for priority in sorted(self._classes))
            request = next(filter(None, firsts))
        request.waits = False
        self.waiting -= 1
        return request

    def _oldest(self) -> Requested:
        """Of all in the queue the one that came first; there is one. Late ones came before all others."""
        return self._late[0] if self._late else cast(Requested, self._first(self._in_time))

    @staticmethod
    def _first(queue: deque[Requested]) -> Requested | None:
        """The first of a queue that still waits in time."""
        while queue and (queue[0].late or not queue[0].waits):
            queue.popleft()
        return queue[0] if queue else None
