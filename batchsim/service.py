"""The costs of a service that a user's table describes, for the simulated machine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from batchsim.batching.batch import AnyBatch
from batchsim.costs import Draws
from batchsim.operations import KernelSync
from batchsim.service_times import BINS, ServiceTime, TableService
from batchsim.streams import Burst, Latencies

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]


def service_ns(table: TableService, largest: int) -> Int64:
    """(largest + 1, BINS): nanoseconds of a batch of so many requests, in each of the equal-count bins.

    Between two sizes of the table each bin is interpolated monotonically (PCHIP: Fritsch and Butland 1984), so that
    what is slow at one size is slow at the next. A batch smaller than the smallest takes as long as that. Beyond the
    largest, bins go on as between the last two sizes; from a single size, in proportion.
    """
    entries = sorted((int(size), entry) for size, entry in table.batch_ms.items())
    known = np.array([size for size, _ in entries])
    bins = np.array([_bins_ms(entry) for _, entry in entries])
    sizes = np.arange(largest + 1)
    found = np.empty((largest + 1, BINS))
    found[:] = bins[0]
    if len(known) > 1:
        from scipy.interpolate import PchipInterpolator

        inside = (sizes > known[0]) & (sizes <= known[-1])
        found[inside] = PchipInterpolator(known, bins)(sizes[inside])
        slope = np.maximum(bins[-1] - bins[-2], 0) / (known[-1] - known[-2])
    else:
        slope = bins[0] / known[0]
    beyond = sizes > known[-1]
    found[beyond] = bins[-1] + slope * (sizes[beyond] - known[-1])[:, None]
    # At least a nanosecond, so that time passes.
    return np.maximum(np.rint(found * 1e6), 1).astype(np.int64)


def _bins_ms(entry: ServiceTime) -> Float64:
    return np.full(BINS, entry) if isinstance(entry, float) else entry.bins_ms()


class TableCosts:
    """The costs of a table: a batch takes the device what the table says, and the host nothing.

    With `jitter` every batch draws its time from the distribution of its size, from a stream in which the n-th batch
    has the n-th draw, whatever its size; without, it takes the mean.
    """

    latencies = Latencies()

    def __init__(
        self, table: TableService, largest: int, *, jitter: bool = True, seed: int = 0, replication: int = 0
    ) -> None:
        self.times_ns = service_ns(table, largest)
        self.means_ns = self.times_ns.mean(axis=1)
        if not jitter:
            self.times_ns = np.rint(self.means_ns).astype(np.int64)[:, None]
        self._draws = Draws(range(self.times_ns.shape[1]), seed=seed, replication=replication, name="service")
        known = [int(size) for size in table.batch_ms]
        self._range = min(known), max(known)
        self._asked: set[int] = set()

    def host_ns(self, phase: str, batch: AnyBatch | None) -> int:  # noqa: ARG002
        """See `batchsim.machine.Costs`."""
        return 0

    def copy_ns(self, phase: str, batch: AnyBatch) -> int:  # noqa: ARG002
        """See `batchsim.machine.Costs`."""
        return 0

    def launch(self, batch: AnyBatch, kernels: KernelSync = "stream") -> Sequence[Burst]:  # noqa: ARG002
        """See `batchsim.machine.Costs`: one burst."""
        self._asked.add(batch.num_seqs)
        return (Burst((0,), (int(self.times_ns[batch.num_seqs, int(self._draws.next())]),)),)

    def take(self, count: int) -> Int64:
        """The bins of the next `count` batches."""
        return self._draws.take(count).astype(np.int64)

    def note_sizes(self, sizes: Sequence[int]) -> None:
        """Batches of these sizes were asked for."""
        self._asked.update(sizes)

    def extrapolated(self) -> list[str]:
        """What was asked for outside the table, a sentence each; empty where nothing was."""
        low, high = self._range
        outside = [size for size in self._asked if not low <= size <= high]
        if not outside:
            return []
        known = f"{low}" if low == high else f"{low}..{high}"
        return [f"batches (the table has those of {known}): extrapolated to {min(outside)}..{max(outside)}"]
