"""Sweeps on a Ray cluster of two nodes on this machine: the bytes of a local one, whatever dies on the way."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batchsim.errors import RunError
from batchsim.sweep import on_ray, pool
from batchsim.sweep.point import told
from batchsim.sweep.points import code_version
from batchsim.sweep.run import of, run
from tests.sweeps import SERVER, contents, server_sweep

TRACE = "arrived_at,num_prefill_tokens,num_decode_tokens\n" + "".join(f"{i / 50},20,1\n" for i in range(100))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a cluster with a core on each of its two nodes."""
    pytest.importorskip("ray", reason="Ray is not installed")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        yield cluster.address
    finally:
        cluster.shutdown()


def traced(folder: Path) -> dict[str, Any]:
    """A sweep over a trace, which the nodes have to be sent; the last point starts after its end."""
    (folder / "trace.csv").write_text(TRACE, encoding="utf-8")
    points: list[dict[str, Any]] = [{"workload.rate_scale": scale, "max_batch_size": 4} for scale in (0.5, 1, 2)]
    scenario = SERVER | {"workload": {"kind": "trace", "path": "trace.csv"}}
    return {"kind": "sweep", "name": "x", "scenario": scenario, "list": [*points, {"workload.start": 1000}]}


def test_the_results_are_those_of_this_machine(address: str, tmp_path: Path) -> None:
    sweep = of(traced(tmp_path), base=tmp_path, draws=2)
    found = run(sweep, tmp_path / "here", workers=0)
    run(sweep, tmp_path / "there", engine="ray", address=address)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert [point["error"] is not None for point in found.points] == [False, False, False, True]
    assert found.points[-1]["error"].endswith("with 100 requests in trace.csv, wanted at most 99")


def test_a_worker_that_dies_costs_its_point_alone(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = str(tmp_path / "notes")

    def deadly(task: Any, sent: Any, version: str) -> bytes:
        """Dies at the point of size 4 each time, and at that of size 8 the first time; notes each begin."""
        from batchsim.sweep.on_ray import _told as real

        size = task.fields["max_batch_size"]
        with open(notes, "a+") as file:
            file.seek(0)
            first = str(size) not in file.read().split()
            file.write(f"{size} ")
        if size == 4 or (size == 8 and first):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(task, sent, version)

    sizes = [2, 4, 6, 8, 10, 12]
    sweep = of(server_sweep() | {"grid": {"max_batch_size": sizes}}, draws=0)
    monkeypatch.setattr(on_ray, "_told", deadly)
    found = run(sweep, engine="ray", address=address)
    here = run(sweep, workers=0)
    begun = Counter(map(int, Path(notes).read_text().split()))
    assert begun == Counter({size: 2 if size in (4, 8) else 1 for size in sizes})
    assert [point["error"] for point in found.points] == [None, pool.DIED, None, None, None, None]
    assert [point for point in found.points if not point["error"]] == [here.points[0], *here.points[2:]]


def test_another_version_of_the_code_is_refused() -> None:
    (task,) = of(server_sweep() | {"grid": {"seed": [1]}}, draws=0).tasks().values()
    assert on_ray._told(task, None, code_version()) == told(task)
    with pytest.raises(RunError, match="another version of batchsim"):
        on_ray._told(task, None, "another")


def test_where_there_is_no_cluster_it_says_so() -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    with pytest.raises(RunError, match="no Ray cluster at here"):
        run(of(server_sweep(4), draws=0), engine="ray", address="here")


def test_where_there_is_no_ray_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RunError, match=r"pip install 'batchsim\[ray\]'"):
        run(of(server_sweep(4), draws=0), engine="ray")
