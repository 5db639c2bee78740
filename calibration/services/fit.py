"""From the samples of a service's cells to a profile."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import nnls

from batchsim.profile import DecodeCurve, DeviceFit, KernelCounts, LoopFit, PrefillFit, Profile
from batchsim.schedules import LOOPS, loop_name
from calibration.cells import Samples
from calibration.fit import (
    LOOP_PHASES,
    Floats,
    bin_means,
    device_times,
    fit_eager,
    fit_phase,
    median_of,
    no_phase,
    split_outliers,
    summary,
)
from calibration.services.cells import Cell

Measured = Mapping[Cell, Samples]
ANY_LENGTH = 1_000_000  # tokens, more than any request has


def fit_profile(
    measured: Measured, *, name: str, model: str, facts: dict[str, Any], device_memory_bytes: int, overlaps: bool,
    kernels: KernelCounts, copies: list[dict[str, Any]],
) -> Profile:  # fmt: skip
    """Fit everything that a profile of a service holds. It has the loops that were measured."""
    curves = fit_curves(measured)
    loops: dict[str, LoopFit] = {}
    for schedule in LOOPS:
        for graphs in (True, False):
            name_ = loop_name(schedule, graphs=graphs)
            if any(cell.loop == name_ for cell in measured):
                like = next((loops[n] for n in (f"{schedule}/graph", "sync/graph", "sync/eager") if n in loops), None)
                loops[name_] = fit_loop(measured, schedule, graphs=graphs, kernels=kernels, like=like)
    return Profile(
        schema_version=1,
        kind="profile",
        name=name,
        model=model,
        provenance=facts,
        device_memory_bytes=device_memory_bytes,
        overlaps=overlaps,
        kernels=kernels,
        loops=loops,
        device=fit_device(measured, curves, kernels),
        copies=copies,
        cells=[summary(cell, samples) for cell, samples in measured.items()],
    )


def fit_loop(
    measured: Measured, schedule: str, *, graphs: bool, kernels: KernelCounts, like: LoopFit | None = None
) -> LoopFit:
    """Host phases, copies and fixed delays of one loop; a delay that it never shows is taken from the loop `like`.

    Busy and paced cells count alike, so that the costs lie between those of a host that never rests and one that does.
    """
    own = {c: s for c, s in measured.items() if c.schedule == schedule and c.graphs == graphs}
    every = (*LOOP_PHASES, "wait", *(("launch",) if graphs else ()))
    cells = {phase: [(c, s[phase]) for c, s in own.items() if s.get(phase)] for phase in every}
    eager = [(c, s["launch"]) for c, s in measured.items() if not c.graphs and s.get("launch")]
    launches = [(c, [ns / kernels.total(0) for ns in samples]) for c, samples in eager]
    # On one stream no forward waits for another, but each for its copy in, with the same pause; where copies are too
    # short for that, a pause of one kind stands for the other's.
    after_copy = median_of(own, "after_copy", -1)
    gap = max(median_of(own, "gap", after_copy if after_copy >= 0 else like.gap_ns if like else 0), 0)
    event = after_copy if after_copy >= 0 else gap
    copy_in, copy_out = fit_copy(own, "device_copy_in"), fit_copy(own, "device_copy_out", by_tokens=False)
    return LoopFit(
        phases={phase: fit_phase(found) if found else no_phase() for phase, found in cells.items()},
        kernel_launch=fit_phase(launches, per_batch=False) if launches else no_phase(),
        launch_ns=median_of(own, "launch_latency", like.launch_ns if like else 0),
        copy_ns=max(median_of(own, "copy_latency", like.copy_ns if like else 0), 0),
        event_ns=event,
        gap_ns=gap,
        wake_up_ns=max(median_of(own, "collect", 0) - (event if cells["stream_wait"] else gap), 0),
        copy_in_device_ns=round(copy_in["step_ns"]),
        copy_in_device_seq_ns=round(copy_in["seq_ns"], 2),
        copy_in_device_token_ns=round(copy_in["token_ns"], 5),
        copy_out_device_ns=round(copy_out["step_ns"]),
        copy_out_device_seq_ns=round(copy_out["seq_ns"], 2),
    )


def fit_copy(cells: Measured, stage: str, *, by_tokens: bool = True) -> dict[str, float]:
    """Device time of a copy by what the batch holds: non-negative least squares of medians, in relative terms."""
    costs = {"step_ns": 0.0, "seq_ns": 0.0, "token_ns": 0.0}
    found = [(c.holds, float(np.median(s[stage]))) for c, s in cells.items() if s.get(stage)]
    if found:
        names = [name for name in found[0][0] if by_tokens or name != "token_ns"]
        rows = np.array([[holds[name] / ns for name in names] for holds, ns in found], np.float64)
        terms, _ = nnls(rows, np.ones(len(rows)))
        costs |= {name: float(term) for name, term in zip(names, terms, strict=True)}
    return costs


def fit_curves(measured: Measured) -> list[DecodeCurve]:
    """Device time of a forward of each size by the tokens of all its rows.

    Busy and paced cells, and both loops with graphs, count alike.
    """
    means: defaultdict[int, defaultdict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell, samples in measured.items():
        if cell.graphs and samples.get("forward"):
            mean_ns = float(device_times(samples["forward"]).mean())
            means[cell.num_seqs][cell.num_tokens or cell.num_seqs].append(mean_ns)
    curves = []
    for size, by_tokens in sorted(means.items()):
        ns = {tokens: round(float(np.mean(found)), 1) for tokens, found in by_tokens.items()}
        if len(ns) == 1:  # the same at any length
            ns[size * ANY_LENGTH] = next(iter(ns.values()))
        curves.append(DecodeCurve(size=size, kv_tokens=sorted(ns), ns=[ns[tokens] for tokens in sorted(ns)]))
    return curves


def fit_device(measured: Measured, curves: Sequence[DecodeCurve], kernels: KernelCounts) -> DeviceFit:
    """Device times of forwards, and how they scatter around the curves."""
    by_size = {curve.size: curve for curve in curves}

    def expected_ns(cell: Cell) -> float:
        return by_size[cell.num_seqs].at(cell.num_tokens or cell.num_seqs)

    ratios: list[Floats] = []
    for cell, samples in measured.items():
        if cell.graphs and samples.get("forward"):
            ratios.append(device_times(samples["forward"]) / expected_ns(cell))
    eager = [
        (c.num_seqs, {"decode": s["forward"], "launch": s["launch"]}, expected_ns(c))
        for c, s in measured.items()
        if not c.graphs and s.get("forward") and s.get("launch")
    ]
    factor, outer_share = fit_eager(eager, kernels) if eager else (1.0, 0.0)
    return DeviceFit(
        decode=list(curves),
        prefill=PrefillFit(
            tile=1, num_tokens=[1, 2], ns=[0.0, 0.0], pair_ns=0.0, depth_ns=0.0, mixed_ns=0.0, row_ns=0.0, kv_ns=0.0,
            residuals={},
        ),  # a service has none
        eager_factor=factor,
        outer_share=outer_share,
        decode_ratios=bin_means(np.concatenate(ratios)),
        prefill_ratios=[1.0],
    )  # fmt: skip


def regimes(measured: Measured) -> dict[str, float]:
    """How much longer stages take in paced cells than in busy ones, as a share: the median of the cells."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for cell, samples in measured.items():
        busy = measured.get(Cell(cell.schedule, cell.graphs, False, cell.num_seqs, cell.length))
        if cell.paced and busy is not None:
            for stage, values in samples.items():
                if values and busy.get(stage) and stage not in ("wait", "gap"):
                    own, other = (float(split_outliers(v)[0].mean()) for v in (values, busy[stage]))
                    if other > 0:
                        found[f"{cell.loop}/{stage}"].append(own / other - 1)
    return {name: round(float(np.median(values)), 4) for name, values in sorted(found.items())}
