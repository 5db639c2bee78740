"""The overheads of a device, fitted to its probes."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

import numpy as np

from batchsim.memory.allocator import rounded
from batchsim.memory.overheads import AttentionKernel, Library
from batchsim.memory.services import BIAS_WORKSPACE, STEM
from batchsim.memory.training import SEGMENT_ROWS, SORTED_ROWS

BFLOAT16, FLOAT32 = 2, 4
# Channels of a convolution on tensor cores, in 16-byte vectors of bfloat16: cuDNN copies images of fewer.
PADDED_CHANNELS = 8
IMAGE, STEM_CHANNELS = 224, 64  # of the convolution in calibration.memory.probe
VOCABULARY = 32_000  # rows of the table in calibration.memory.probe


def fit_library(probes: Mapping[str, Any], name: str) -> tuple[Library, list[str]]:
    """The overheads, and how far the fits are off, a line each."""
    lines: list[str] = []
    kernels: dict[str, AttentionKernel] = {}
    composes = False
    for width in (2, 4):
        for grouped in (False, True):
            cases = [
                case
                for case in probes["attention"]
                if case["width"] == width and (case["heads"] != case["kv_heads"]) == grouped
            ]
            label = f"{width} grouped" if grouped else f"{width}"
            if not cases:
                continue
            if not any("Scaled" in case["kernel"] for case in cases):
                composes = composes or (grouped and width == 4)
                lines.append(f"attention of {label}: composed ({cases[0]['kernel']})")
                continue
            kernels[label], told = _attention(cases)
            lines.append(f"attention of {label} ({cases[0]['kernel']}): {told}")
    lines += _checked(probes)
    graphs = {int(kernels_): size for kernels_, size in probes["graphs"].items()}
    most = max(graphs)
    library = Library(
        name=name,
        provenance=dict(probes["provenance"]),
        product_workspace=probes["product_workspace"],
        attention_kernels=kernels,
        composes_grouped_float=composes,
        sorts_embeddings=True,
        pads_channels=PADDED_CHANNELS,
        context=probes["context_after"],
        graph_kernel=max(0, graphs[most] // most),
    )
    return library, lines


def _checked(probes: Mapping[str, Any]) -> list[str]:
    """How far probes are from what tapes take as given, bytes: (peak, kept) of forwards and backwards."""
    lines = []
    for case in probes["attention"]:
        pairs = case["sequences"] * case["length"] * case["heads"]
        expected = pairs * case["head_dim"] * case["width"] + pairs * FLOAT32
        off = [measured - expected for measured in case["forward"]]
        lines.append(f"attention's forward, {case['width']} bytes, {pairs:,} rows: off by {off[0]:+,}, {off[1]:+,}")
    for case in probes["rows"]:
        rows, hidden, width = case["rows"], case["hidden"], case["width"]
        size, scores = rows * hidden * width, rows * VOCABULARY * FLOAT32
        segments = (rows // SEGMENT_ROWS + min(rows, VOCABULARY)) * hidden * FLOAT32 if rows > SORTED_ROWS else 0
        expected_of = {
            "norm": (size + rows * FLOAT32, size + hidden * width),
            "embedding": (size, VOCABULARY * hidden * width + segments),
            "loss": (scores, 2 * scores),
        }
        for name, (forward, backward) in expected_of.items():
            off = [case[name][0][0] - forward, case[name][1][0] - backward]
            lines.append(
                f"{name}, {width} bytes, {rows:,} x {hidden:,}: off by {off[0]:+,} forward, {off[1]:+,} backward"
            )
    for case in probes.get("stem", []):
        peak, kept = case["forward"]
        count = case["images"]
        padded = (count * IMAGE**2 + STEM_CHANNELS * STEM**2) * PADDED_CHANNELS * BFLOAT16
        lines.append(f"a convolution of {count} images: off by {peak - kept - padded:+,}")
    if "biased_product_workspace" in probes:
        off_by = probes["biased_product_workspace"] - BIAS_WORKSPACE
        lines.append(f"the workspace of products with a bias: off by {off_by:+,}")
    return lines


def _attention(cases: list[dict[str, Any]]) -> tuple[AttentionKernel, str]:
    """Least squares on what the backward pass takes beside the gradients of queries, keys and values."""
    features, extras = [], []
    for case in cases:
        tokens = case["sequences"] * case["length"]
        pairs, size = tokens * case["heads"], case["width"]
        gradients = rounded(pairs * case["head_dim"] * size)
        gradients += 2 * rounded(tokens * case["kv_heads"] * case["head_dim"] * size)
        features.append((pairs * case["head_dim"], pairs))
        extras.append(case["backward"][0] - gradients)
    solution, *_ = np.linalg.lstsq(np.array(features, dtype=float), np.array(extras, dtype=float), rcond=None)
    element = max(0, round(float(solution[0])))
    # Heads of one size leave open what belongs to elements and what to rows: elements take whole bytes. A median,
    # because a block may be up to 1 MiB larger than what was asked for.
    rest = [(extra - element * a) / b for (a, b), extra in zip(features, extras, strict=True)]
    row = max(0, round(median(rest)))
    fixed = max(0, min(extra - element * a - row * b for (a, b), extra in zip(features, extras, strict=True)))
    off = [element * a + row * b + fixed - extra for (a, b), extra in zip(features, extras, strict=True)]
    worst = max(off, key=abs)
    kernel = AttentionKernel(element=element, row=row, fixed=fixed)
    return kernel, f"{element} bytes an element, {row} a row, {fixed} in any case, off by {worst:+,} bytes"
