"""What people look at: a table in the terminal, and a page for the browser."""

from __future__ import annotations

from pathlib import Path

from batchsim.report.terminal import print_run
from batchsim.result import Run

__all__ = ["print_run", "write_report"]


def write_report(path: Path, predicted: Run, measured: Run | None = None) -> None:
    """Write one self-contained HTML page to `path`, whole or not at all; it needs no network.

    The same runs give the same bytes, but for the wall time that they took.
    """
    # plotly takes a while to import, and most commands print no page.
    from batchsim.files import write_text
    from batchsim.report.page import page

    write_text(path, page(predicted, measured))
