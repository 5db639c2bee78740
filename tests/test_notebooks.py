"""The notebooks run as they are, from top to bottom, and are kept without their outputs."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from batchsim.traces import read_trace

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "scenarios" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PLOTLY = "application/vnd.plotly.v1+json"
TIMEOUT_S = 300
JUPYTER = ("CONFIG", "DATA", "RUNTIME")

# Prints the notebook with the outputs of its cells.
RUN = """
import sys
import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

kernels = KernelSpecManager(kernel_dirs=sys.argv[2:], ensure_native_kernel=False)
manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=kernels)
notebook = nbformat.read(sys.argv[1], 4)
nbformat.write(NotebookClient(notebook, km=manager).execute(), sys.stdout)
"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
@pytest.mark.skipif(find_spec("nbclient") is None, reason="nbclient, which runs notebooks, is not installed")
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    """Every cell runs, its own asserts included, without a warning; tables and figures show themselves."""
    code = [cell for cell in _executed(path, tmp_path)["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert [output for output in outputs if output["output_type"] in ("error", "stream")] == []
    kinds = [kind for output in outputs for kind in output["data"]]
    assert kinds.count(PLOTLY) >= 3 and "text/html" in kinds and "text/markdown" in kinds
    figures = [output["data"][PLOTLY] for output in outputs if PLOTLY in output["data"]]
    assert all(figure["data"] and all(_has_points(trace) for trace in figure["data"]) for figure in figures)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    """What a run shows is never older than the code; changes of a notebook can be read. Text stands between cells."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for cell in content["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
    assert content["cells"][0]["cell_type"] == content["cells"][-1]["cell_type"] == "markdown"
    assert content["metadata"]["kernelspec"]["name"] == "python3"


def test_the_trace_is_what_its_script_writes() -> None:
    """And it is in the published format, as it says."""
    script = runpy.run_path(str(FOLDER / "make_chat_trace.py"))
    path = FOLDER / "chat_trace.csv"
    assert path.read_text(encoding="utf-8").splitlines() == list(script["rows"]())
    trace = read_trace(path, "azure")
    assert len(trace.arrival_ns) == script["REQUESTS"]
    for tokens, (median, _, most) in (
        (trace.prompt_tokens, script["CONTEXT"]),
        (trace.output_tokens, script["GENERATED"]),
    ):
        assert sorted(tokens)[len(tokens) // 2] == pytest.approx(median, rel=0.15)
        assert tokens.min() >= 1 and tokens.max() <= most


def _executed(path: Path, folder: Path) -> Any:
    """The notebook at `path`, run by this interpreter; nothing of the user's own settings or kernels is used.

    It runs in a process of its own: the clients of kernels leave sockets to the garbage collector.
    """
    spec = folder / "kernels" / "python3"
    spec.mkdir(parents=True)
    kernel = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": kernel, "display_name": "", "language": "python"}))
    own = {name: str(folder / name.lower()) for name in ("IPYTHONDIR", *(f"JUPYTER_{each}_DIR" for each in JUPYTER))}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path), str(folder / "kernels")],
        capture_output=True, text=True, timeout=TIMEOUT_S, cwd=path.parent, check=False,
        env=os.environ | own | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _has_points(trace: dict[str, Any]) -> bool:
    return any(len(trace.get(axis) or ()) > 0 for axis in ("x", "y", "z"))
