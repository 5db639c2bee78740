"""What a machine, simulated or real, asks of any batcher and of the batches that it forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class AnyBatch(Protocol):
    """One step's work, as the costs of a step depend on it; see `batchsim.batching.continuous.Batch`."""

    @property
    def index(self) -> int: ...

    @property
    def num_seqs(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def prefill_tokens(self) -> int: ...

    @property
    def kv_tokens(self) -> int: ...

    @property
    def admitted(self) -> int: ...

    @property
    def stage(self) -> str:
        """The stage that its forward is, as `batchsim.records` calls them."""
        ...

    def prefill_pairs(self, tile: int) -> int: ...

    @property
    def prefill_depth(self) -> int: ...


class Batcher(Protocol):
    """Decides which requests form the next batch."""

    def submit(self, request: Any) -> None:
        """A request arrives now."""
        ...

    def schedule(self, now_ns: int) -> Any:
        """The next batch, with what has arrived by now, or None when there is nothing to run yet."""
        ...

    def update(self, batch: Any) -> Sequence[Any]:
        """The results of `batch` were read; the requests that this completes."""
        ...

    @property
    def next_decision_ns(self) -> int | None:
        """The earliest later moment at which `schedule` may answer differently, or None: never."""
        ...

    @property
    def finished(self) -> int: ...

    @property
    def counts(self) -> dict[str, int]:
        """Requests finished, and tokens where any are generated, as `Totals.result` takes them."""
        ...

    @property
    def unserved(self) -> int:
        """Requests that have arrived and are not finished."""
        ...


class BatchLog(Protocol):
    """Is told of the decisions and updates of a machine, in order."""

    def scheduled(self, batch: Any, now_ns: int, batcher: Any) -> None: ...

    def updated(self, batch: Any, end_ns: int) -> None: ...

    def idle(self, now_ns: int) -> None:
        """From now on there is nothing to run."""
        ...
