"""What a calibration keeps of its runs: disturbances of the host are told from batches that take longer."""

from __future__ import annotations

from pathlib import Path

from calibration.services.cells import of_any_length, plan
from calibration.store import Store


def test_only_what_takes_longer_than_its_like_is_disturbed(tmp_path: Path) -> None:
    """Calls that take longer because the batch is larger are no disturbance; a busy host is, whatever the batch."""
    cells = [cell for drill in plan(sizes=(1, 2, 4, 8, 16), lengths=(64, 128)) for cell in drill.cells]
    store = Store(tmp_path / "partial", {}, resume=False, kind=of_any_length)
    for round_ in range(3):
        for cell in cells:
            call = 10_000 + 3_000 * cell.num_seqs
            slowed = 2 if (round_, cell.num_seqs, cell.length) == (1, 16, 128) else 1
            calls = {phase: [call * slowed] for phase in ("copy_in", "copy_out", "record")}
            store.add(cell, calls | {"forward": [10**6 + round_]})
    disturbed = {key for (key, _), found in zip(store.runs, store.disturbed(), strict=True) if found}
    assert disturbed == {cell.key for cell in cells if (cell.num_seqs, cell.length) == (16, 128)}
    for cell, samples in store.measured(cells).items():
        assert set(samples["copy_in"]) == {10_000 + 3_000 * cell.num_seqs}
        assert len(samples["copy_in"]) == (2 if cell.key in disturbed else 3)
        assert len(samples.get("forward", [])) == (3 if cell.graphs or cell.key not in disturbed else 2)
