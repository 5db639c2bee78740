"""Programs of several processes, one a device: started, watched and ended together.

A rank that waits for another one waits on the device, where no exception reaches it; so whatever goes wrong, and
whenever time is up, all ranks are killed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

from batchsim.errors import RunError

POLL_S = 0.05
# Ranks are of one host. A pair has no use for multicast, nor for the registration of graphs' buffers; torch's own
# watchdogs would only compete with this one, and their queries with captures.
ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_GRAPH_REGISTER": "0",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "OMP_NUM_THREADS": "1",
}


def launch(command: Sequence[str], size: int, *, limit_s: float) -> None:
    """Run `command RANK STORE` for every rank of `size`, where STORE is a path at which they may meet.

    Raises:
        RunError: a rank failed, or they were not done after `limit_s` seconds; none of them is left.
    """
    deadline = time.monotonic() + limit_s
    with TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        environment = {**os.environ, **ENVIRONMENT}
        ranks = [
            subprocess.Popen([*command, str(rank), store], env=environment, preexec_fn=_end_with_parent)
            for rank in range(size)
        ]
        try:
            while None in (codes := [rank.poll() for rank in ranks]):
                if any(codes):
                    break
                if time.monotonic() > deadline:
                    raise RunError(f"{size} ranks were not done after {limit_s:g} s, and were ended")
                time.sleep(POLL_S)
        finally:
            for process in ranks:
                process.kill()
            for process in ranks:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(10)
    failed = [f"rank {rank} with exit code {code}" for rank, code in enumerate(codes) if code]
    if failed:
        raise RunError(f"{' and '.join(failed)} failed; the others were ended")


def _end_with_parent() -> None:
    """Have the kernel kill this process when the one that started it has gone, however that was."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@contextmanager
def joined(rank: int, size: int, path: str, device: str) -> Iterator[torch.device]:
    """The device of this rank (`cuda` or `cpu`), in a process group of them all, on cores that no other rank uses.

    On a GPU the process ends with the block, once all ranks have come there or at once after an error: a communicator
    cannot be taken down while there are graphs that captured its calls, or others that do not come.
    """
    if hasattr(os, "sched_setaffinity") and len(cores := sorted(os.sched_getaffinity(0))) >= size:
        share = len(cores) // size
        os.sched_setaffinity(0, cores[rank * share : (rank + 1) * share])
    own = torch.device("cpu")
    if device == "cuda":
        own = torch.device("cuda", rank)
        torch.cuda.set_device(own)
    store = dist.FileStore(path, size)  # type: ignore[attr-defined]
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=300),
        device_id=own if device == "cuda" else None,
    )
    code = 0
    try:
        yield own
        if device == "cuda":
            torch.cuda.synchronize()
    except BaseException:
        if device != "cuda":
            raise
        traceback.print_exc()
        code = 1
    if device != "cuda":
        dist.destroy_process_group()
        return
    store.add("done", 1)
    while code == 0 and store.add("done", 0) < size:
        time.sleep(POLL_S)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
