"""From the samples of the cells to a profile's fits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls

from batchsim.profile import DecodeCurve, DeviceFit, KernelCounts, LoopFit, PhaseFit, PrefillFit, Profile
from batchsim.schedules import LOOPS, loop_name
from calibration.cells import Cell, Samples

Measured = Mapping[Cell, Samples]
Floats = NDArray[np.float64]

BINS = 64
# A sample this many interquartile ranges above its cell's median is an interruption by another program: counted,
# and left out of fits and draws.
OUTLIER_RANGES = 20.0
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
LOOP_PHASES = ("schedule", "build_inputs", "copy_in", "copy_out", "record", "stream_wait", "update")
# Prompts are measured in the sync loop alone, where every step holds nothing else; what they add to these phases is
# taken from there.
PROMPT_PHASES = ("schedule", "build_inputs", "update")
DIGITS = {"step_ns": 1, "seq_ns": 3, "prefill_token_ns": 4, "admitted_ns": 2, "token_ns": 5}


def split_outliers(samples: Sequence[float], least: float = 5.0) -> tuple[Floats, Floats]:
    """(kept, outliers), nanoseconds; the bound is at least `least` times the median."""
    values = np.asarray(samples, dtype=np.float64)
    low, middle, high = np.percentile(values, (25, 50, 75))
    bound = max(middle + OUTLIER_RANGES * (high - low), least * middle)
    return values[values <= bound], values[values > bound]


def bin_means(ratios: Floats, bins: int = BINS) -> list[float]:
    """Means of equal-count bins of the sorted ratios: a compact distribution with the same mean."""
    parts = np.array_split(np.sort(ratios), min(bins, len(ratios)))
    # Bins of unequal counts would shift the mean by a little; scale that away.
    means = np.array([part.mean() for part in parts])
    return [round(float(m), 5) for m in means * (ratios.mean() / means.mean())]


class Costed(Protocol):
    """A cell whose host phases are fitted: what its batch holds, by the cost in `PhaseFit` that multiplies it."""

    @property
    def key(self) -> str: ...
    @property
    def holds(self) -> Mapping[str, float]: ...


def fit_phase(cells: Iterable[tuple[Costed, Sequence[float]]], *, per_batch: bool = True) -> PhaseFit:
    """Non-negative least squares of the cells' means, in relative terms, over what the batch holds.

    With `per_batch` off, the cost is the same for every batch.
    """
    kept: list[tuple[Costed, Floats]] = []
    outliers: list[float] = []
    for cell, samples in cells:
        good, bad = split_outliers(samples)
        kept.append((cell, good))
        outliers.extend(bad)
    costs = tuple(kept[0][0].holds) if per_batch else ("step_ns",)
    rows = np.array([[cell.holds[cost] for cost in costs] for cell, _ in kept], np.float64)
    means = np.array([good.mean() for _, good in kept])
    terms, _ = nnls(rows / means[:, None], np.ones(len(means)))
    fitted = rows @ terms
    ratios = np.concatenate([good / max(f, 1.0) for (_, good), f in zip(kept, fitted, strict=True)])
    return PhaseFit(
        **{cost: round(float(term), DIGITS[cost]) for cost, term in zip(costs, terms, strict=True)},
        ratios=bin_means(ratios),
        samples=len(ratios),
        outliers=len(outliers),
        outlier_ns=float(sum(outliers)),
        residuals={c.key: round(float(f / m - 1), 4) for (c, _), f, m in zip(kept, fitted, means, strict=True)},
    )


def fit_loop(
    measured: Measured, schedule: str, *, graphs: bool, kernels: KernelCounts, like: LoopFit | None = None
) -> LoopFit:
    """Host phases and fixed delays of one loop.

    A delay that this loop never shows (a busy device hides the launch latency, an idle one the gap) is taken from
    the loop `like`; so is what prompts add to a phase.
    """
    own = {c: s for c, s in measured.items() if c.schedule == schedule and c.graphs == graphs and not c.chunk}
    prefill = {c: s for c, s in measured.items() if c.chunk}
    phases = {}
    for phase in (*LOOP_PHASES, "wait"):
        cells = [(c, s[phase]) for c, s in own.items() if s.get(phase)]
        if phase in PROMPT_PHASES and like is None:
            cells += [(c, s[phase]) for c, s in prefill.items() if s.get(phase)]
        phases[phase] = fit_phase(cells) if cells else no_phase()
        if phase in PROMPT_PHASES and like is not None:
            sync = like.phases[phase]
            added = {"prefill_token_ns": sync.prefill_token_ns, "admitted_ns": sync.admitted_ns}
            phases[phase] = phases[phase].model_copy(update=added)
    if graphs:
        phases["launch"] = fit_phase([(c, s["launch"]) for c, s in own.items() if s.get("launch")])
    # A kernel's launch is the same call in both schedules; measured apart they differ by noise alone.
    eager = [(c, s["launch"]) for c, s in measured.items() if not c.graphs and not c.chunk and s.get("launch")]
    per_kernel = [(cell, [ns / kernels.total(cell.num_seqs) for ns in samples]) for cell, samples in eager]
    gap = median_of(own, "gap", like.gap_ns if like else 0)
    copy_in = median_of(own, "device_copy_in", like.copy_in_device_ns if like else 0)
    copy_out = median_of(own, "device_copy_out", like.copy_out_device_ns if like else 0)
    return LoopFit(
        phases=phases,
        kernel_launch=fit_phase(per_kernel, per_batch=False),
        launch_ns=median_of(own, "launch_latency", like.launch_ns if like else 0),
        copy_ns=max(median_of(own, "copy_latency", like.copy_ns if like else 0), 0),
        # On one stream the copy out follows the forward after a gap, on two after an event: the same pause.
        event_ns=gap,
        gap_ns=gap,
        wake_up_ns=max(median_of(own, "collect", 0) - copy_out - gap, 0),
        copy_in_device_ns=copy_in,
        copy_out_device_ns=copy_out,
    )


def no_phase() -> PhaseFit:
    """A phase that this loop does not have."""
    return PhaseFit(step_ns=0.0, ratios=[1.0], samples=1, outliers=0, outlier_ns=0.0, residuals={})


def median_of(cells: Mapping[Any, Samples], stage: str, default: int) -> int:
    """Median over the cells of each cell's median, so that no cell counts more for having more samples."""
    medians = [float(np.median(s[stage])) for s in cells.values() if s.get(stage)]
    return round(float(np.median(medians))) if medians else default


def fit_device(measured: Measured, kernels: KernelCounts, tile: int) -> DeviceFit:
    """Device times of forwards, of both schedules together: the device does the same work in either."""
    decode = [(c, device_times(s["decode"])) for c, s in measured.items() if c.graphs and not c.chunk]
    points: dict[int, dict[int, list[Floats]]] = {}
    for cell, times in decode:
        points.setdefault(cell.num_seqs, {}).setdefault(cell.kv_tokens, []).append(times)
    curves = [
        DecodeCurve(
            size=size,
            kv_tokens=sorted(by_context),
            ns=[round(float(np.concatenate(by_context[x]).mean()), 1) for x in sorted(by_context)],
        )
        for size, by_context in sorted(points.items())
    ]
    by_size = {curve.size: curve for curve in curves}
    eager = [
        (c.num_seqs, s, by_size[c.num_seqs].at(c.kv_tokens))
        for c, s in measured.items()
        if not c.graphs and not c.chunk and s.get("launch")
    ]
    eager_factor, outer_share = fit_eager(eager, kernels)
    prefill_fit, prefill_ratios = fit_prefill(measured, curves, tile)
    return DeviceFit(
        decode=curves,
        prefill=prefill_fit,
        eager_factor=eager_factor,
        outer_share=outer_share,
        decode_ratios=bin_means(np.concatenate([times / times.mean() for _, times in decode])),
        prefill_ratios=prefill_ratios,
    )


def device_times(samples: Sequence[float]) -> Floats:
    """The samples without outliers; nothing on a device takes half as long again for a reason of its own."""
    return split_outliers(samples, least=1.5)[0]


def fit_eager(eager: Sequence[tuple[int, Samples, float]], kernels: KernelCounts) -> tuple[float, float]:
    """(factor on the graph's kernel time, share of it outside the layers) of forwards launched kernel by kernel.

    Where the device is the bottleneck the forwards' lengths tell the factor; where the host is, a forward ends
    one LM head after its last launch, which tells the share. Where all cells are bound by the host the factor
    hardly shows, and a weak prior keeps it near 1.
    """
    spans = [
        (rows, float(np.median(s["decode"])), float(np.median(s["launch"])) / kernels.total(rows), kernel_ns)
        for rows, s, kernel_ns in eager
    ]

    def residuals(terms: Floats) -> list[float]:
        factor, share = terms
        errors = [
            kernels.alone_ns(rows, launch_ns, kernel_ns * factor, share) / span_ns - 1
            for rows, span_ns, launch_ns, kernel_ns in spans
        ]
        return [*errors, 0.003 * (factor - 1)]

    terms = least_squares(residuals, (1.0, 0.1), bounds=((0.8, 0.0), (2.0, 0.6)), diff_step=(1e-3, 1e-3)).x
    return round(float(terms[0]), 4), round(float(terms[1]), 4)


def _launch_bound(samples: Samples) -> bool:
    """Whether the host's launches, not the device, set the length of these prefills."""
    return float(np.median(samples["launch"])) > 0.8 * float(np.median(samples["prefill"]))


def fit_prefill(measured: Measured, curves: Sequence[DecodeCurve], tile: int) -> tuple[PrefillFit, list[float]]:
    """A base time for every number of tokens measured and slopes for attention, by non-negative least squares.

    Forwards of few tokens are bound by their launches and are left out; their kernel time is that of a decode of
    as many rows with next to no context, as the graphs measured it.
    """
    every = [(c, s) for c, s in measured.items() if c.chunk]
    free = [(c, s) for c, s in every if not _launch_bound(s)]
    # On the CPU a launch computes the forward, and tells nothing.
    cells = [(c, device_times(s["prefill"])) for c, s in (free if 2 * len(free) > len(every) else every)]
    counts = sorted({cell.num_tokens for cell, _ in cells})
    rows = np.zeros((len(cells), len(counts) + 5))
    times = np.array([values.mean() for _, values in cells])
    for i, (cell, _) in enumerate(cells):
        rows[i, counts.index(cell.num_tokens)] = 1.0
        rows[i, -5:] = cell.pairs(tile), cell.context + cell.chunk, cell.decodes > 0, cell.decodes, cell.kv_tokens
    terms, _ = nnls(rows / times[:, None], np.ones(len(times)))
    fitted = rows @ terms
    base = {curve.size: max(curve.at(0), curve.ns[0] / 2) for curve in curves if curve.size < counts[0]}
    base |= {count: float(term) for count, term in zip(counts, terms, strict=False)}
    ratios = np.concatenate([values / values.mean() for _, values in cells])
    fit = PrefillFit(
        tile=tile,
        num_tokens=sorted(base),
        ns=[round(base[n], 1) for n in sorted(base)],
        pair_ns=float(terms[-5]),
        depth_ns=round(float(terms[-4]), 3),
        mixed_ns=round(float(terms[-3]), 1),
        row_ns=round(float(terms[-2]), 2),
        kv_ns=round(float(terms[-1]), 4),
        residuals={c.key: round(float(f / t - 1), 4) for (c, _), f, t in zip(cells, fitted, times, strict=True)},
    )
    return fit, bin_means(ratios)


def fit_profile(
    measured: Measured,
    *,
    name: str,
    model: str,
    facts: dict[str, Any],
    device_memory_bytes: int,
    overlaps: bool,
    kernels: KernelCounts,
    tile: int,
    copies: list[dict[str, Any]],
) -> Profile:
    """Fit everything a profile holds to the samples of the cells."""
    loops: dict[str, Any] = {}
    for schedule in LOOPS:
        for graphs in (True, False):
            like = loops.get(loop_name("sync", graphs=graphs))
            loop = fit_loop(measured, schedule, graphs=graphs, kernels=kernels, like=like)
            loops[loop_name(schedule, graphs=graphs)] = loop
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
        device=fit_device(measured, kernels, tile),
        copies=copies,
        cells=[summary(cell, samples) for cell, samples in measured.items()],
    )


def summary(cell: Any, samples: Samples) -> dict[str, Any]:
    """A cell as a profile keeps it: quantiles and counts of each stage."""
    stages = {}
    for stage, values in sorted(samples.items()):
        kept, outliers = split_outliers(values)
        stages[stage] = {
            "quantiles_ns": [round(float(q)) for q in np.quantile(kept, QUANTILES)],
            "mean_ns": round(float(kept.mean())),
            "count": len(values),
            "outliers": len(outliers),
        }
    return {"cell": asdict(cell), "stages": stages}
