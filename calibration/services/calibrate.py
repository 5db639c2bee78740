"""Measure one service on one machine and fit a profile: its server runs the loops that it will run later."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from batchsim.batching.dynamic import DynamicBatcher, Requested
from batchsim.files import write_text
from batchsim.model import SERVICES, ConvNetShape, EncoderShape
from batchsim.profile import KernelCounts, Profile
from batchsim.schedules import SCHEDULES
from calibration.calibrate import RESUMABLE, profile_text
from calibration.cells import Samples
from calibration.copies import measure_copies
from calibration.device import prepare
from calibration.provenance import QuietCore, provenance
from calibration.services.cells import Cell, Drill, Kind, of_any_length, plan
from calibration.services.fit import fit_profile, regimes
from calibration.services.server import Server
from calibration.services.service import Service
from calibration.store import Store

Progress = Callable[[float, str], None]

# Batch sizes that are captured as graphs; other batches are padded to the next one.
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
# Padded lengths: every one that a server with buckets of 64 captures, for a kernel's tiles make steps between them.
LENGTHS = tuple(range(64, 513, 64))
CPU_SIZES, CPU_LENGTHS = (1, 2, 4, 8), (32, 64, 128)
ROUNDS = 3
SURVEY_STEPS = 7


def calibrate(
    model: str, device: str, out: Path, *, resume: bool = False, keep_samples: bool = False,
    progress: Progress | None = None, rounds: int = ROUNDS,
) -> Profile:  # fmt: skip
    """Measure the service `model` on `device` (`cuda` or `cpu`), write the profile to `out` and return it.

    What has been measured is kept in `out` with the suffix `.partial` while the calibration runs, so that an
    interrupted one loses nothing; `resume` goes on from there. `keep_samples` keeps it afterwards, too.

    Raises:
        RunError: no such device, or a partial file of another model or machine.
    """
    prepare(device, "calibrate")
    shape = SERVICES[model]
    facts = provenance(device, f"batchsim calibrate --device {device} --model {model} --rounds {rounds}")
    sizes, lengths = grid(shape, device)
    drills = plan(sizes=sizes, lengths=lengths if isinstance(shape, EncoderShape) else (0,))
    partial = out.with_name(out.name + ".partial")
    identity = {"model": model} | {key: facts.get(key) for key in RESUMABLE}
    store = Store(partial, identity, resume=resume, kind=of_any_length)
    service = service_of(shape, device, sizes, lengths)
    servers = {graphs: Server(service, graphs=graphs, timed_steps=1024) for graphs in (True, False)}
    expected = survey(servers, [cell for drill in drills for cell in drill.cells if cell.paced])
    with QuietCore(move=device == "cuda") as core:
        try:
            for fraction, drill in store.pending(drills, rounds):
                if progress is not None:
                    progress(fraction, drill.key)
                core.settle()
                server = servers[drill.cells[0].graphs]
                for cell, samples in run_drill(server, drill, len(store.runs), expected).items():
                    store.add(cell, samples)
        finally:
            store.save()
    cells = [cell for drill in drills for cell in drill.cells]
    measured = store.measured(cells)
    facts |= {"rounds": rounds, "runs": len(store.runs), "disturbed_runs": sum(store.disturbed())}
    profile = fit_profile(
        measured,
        name=out.stem,
        model=model,
        facts=facts | {"paced_over_busy": regimes(measured)},
        device_memory_bytes=torch.cuda.mem_get_info()[1] if device == "cuda" else 2 << 30,
        overlaps=device != "cpu",
        kernels=kernel_counts(service),
        copies=measure_copies() if device == "cuda" else [],
    )
    write_text(out, profile_text(profile))
    if not keep_samples:
        partial.unlink(missing_ok=True)
    return profile


def grid(shape: EncoderShape | ConvNetShape, device: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Batch sizes and padded lengths to capture and to measure; images have no length."""
    sizes, lengths = (CPU_SIZES, CPU_LENGTHS) if device == "cpu" else (SIZES, LENGTHS)
    if isinstance(shape, ConvNetShape):
        return sizes, (1,)
    return sizes, tuple(length for length in lengths if length <= shape.max_length)


def service_of(
    shape: EncoderShape | ConvNetShape, device: str, sizes: Sequence[int], lengths: Sequence[int]
) -> Service:
    """A service all of whose kernels are compiled and graphs captured."""
    service = Service(shape, device=device, sizes=sizes, lengths=lengths)
    service.warm_up(graphs=False, lengths=lengths[:1])
    service.warm_up(graphs=True)
    return service


def survey(servers: Mapping[bool, Server], cells: Iterable[Cell]) -> dict[Kind, float]:
    """About how long a server is busy with a batch of `cells`, nanoseconds by kind of batch."""
    expected: dict[Kind, float] = {}
    for cell in cells:
        if cell.kind not in expected:
            requests = [Requested(i, 0, cell.length) for i in range(cell.num_seqs * SURVEY_STEPS)]
            batcher = DynamicBatcher(requests, max_batch_size=cell.num_seqs, length_bucket=1)
            server = servers[cell.graphs]
            payloads = [server.payload(request.id, cell.length) for request in requests]
            spans = server.run(SCHEDULES["sync"](), batcher, payloads).spans
            ends = np.array([span.end_ns for span in spans if span.stage == "update"])
            expected[cell.kind] = float(np.median(np.diff(ends)))
    return expected


def run_drill(server: Server, drill: Drill, seed: int, expected: Mapping[Kind, float]) -> dict[Cell, Samples]:
    """One run of `drill`: the samples of its cells. A paced one is paced by what its batches are `expected` to take."""
    batcher = drill.batcher(seed, expected)
    requests = (cell for cell in drill.batches(seed) for _ in range(cell.num_seqs))
    payloads = [server.payload(number, cell.length) for number, cell in enumerate(requests)]
    run = server.run(SCHEDULES[drill.cells[0].schedule](), batcher, payloads)
    return drill.read(run.spans, run.batches)


def kernel_counts(service: Service) -> KernelCounts:
    """The launches of a forward without graphs, in the form that a profile keeps."""
    first, per_layer, last = service.network.launches
    layers = service.shape.num_layers if isinstance(service.shape, EncoderShape) else sum(service.shape.depths)
    return KernelCounts(first=first, layers=layers, per_layer=per_layer, last=last, split_rows=0)
