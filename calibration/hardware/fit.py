"""Fit the law of transfer to products and forwards that were timed on parts of a device (green contexts).

python -m calibration.hardware.probe measure --out DIR --sms 24,48,56,80,88,112,120,132
python -m calibration.hardware.fit keep DIR        # what the probe wrote of each part -> part_timings.json
python -m calibration.hardware.fit law             # -> batchsim/hardware/law.json and products.json, and residuals

The timings that are kept here were measured by a first form of that probe: the same products and forwards, but kernels
in the profiler on 56, 80, 112 and 132 multiprocessors only.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import log
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from scipy.optimize import least_squares

from batchsim.files import write_text
from batchsim.hardware.forwards import DecoderForwards
from batchsim.hardware.law import Law, Rules, rules
from batchsim.hardware.plans import Plan, read_plans
from batchsim.hardware.transfer import Pair, prefill_on
from batchsim.model import MODELS
from batchsim.profile import Profile, load_profile
from calibration.cells import Cell
from calibration.hardware.fit_tiles import (
    DEVICE,
    NAME,
    WHOLE,
    Floats,
    Product,
    Timed,
    plan_by_name,
    products_text,
    tile_law,
    timed_plans,
)
from calibration.hardware.probe import DECODE_STEPS, PREFILL_STEPS

PLACE = Path(__file__).parents[2] / "batchsim" / "hardware"
TIMINGS = Path(__file__).with_name("part_timings.json")
PROFILES = {name: f"h200-{name}" for name in ("llama-3.2-1b", "llama-3.1-8b")}
GAP_US = 1.35  # between the kernels of a graph: what a product takes more there than in the profiler
SMALL = 40
WHOLE_WEIGHT = 0.7
STEPS = (DECODE_STEPS, PREFILL_STEPS)
SHORT_TOKENS = 512  # forwards of fewer, launched kernel by kernel, are bound by their launches

FITTED = {
    "product_latency_ns": (600.0, 6000.0),
    "attention_latency_ns": (0.0, 8000.0), "rows_latency_ns": (300.0, 6000.0),
    "memory_efficiency": (0.85, 0.98), "overlap": (1.3, 4.0), "attention_block_ns": (100.0, 6000.0),
    "attention_bytes_per_ns": (10.0, 100.0), "attention_overlap": (1.5, 12.0), "rows_bytes_per_ns": (10.0, 90.0),
    "full_clock": (0.34, 0.8),
}  # fmt: skip

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def keep(
    folder: Annotated[Path, typer.Argument(help="A JSON of each part, c24.json and so on.")],
    out: Annotated[Path, typer.Option(help="The timings, JSON.")] = TIMINGS,
) -> None:
    """Gather what fits need of the probes' files: products by kernel and time, and whole forwards."""
    parts = {}
    for path in folder.glob("c*.json"):
        probe = json.loads(path.read_text(encoding="utf-8"))
        parts[probe["info"]["stream"]] = probe
    kernels = {_key(entry): (entry["kernel"], entry["grid"]) for entry in _products(parts[WHOLE])}
    content = {
        "provenance": parts[WHOLE]["provenance"],
        "kernels": [[*key, name, grid] for key, (name, grid) in sorted(kernels.items())],
        "products_us": {
            str(sms): [[*_key(entry), round(entry["us"], 3)] for entry in probe["gemm"]]
            + [[*key, round(us + GAP_US, 3)] for key, us in _profiled(probe).items()]
            for sms, probe in sorted(parts.items())
        },
        "forwards_ns": {
            str(sms): [
                [model, *(cell[key] for key in ("num_seqs", "context", "chunk", "decodes")), _decode_context(cell),
                 cell["kv_tokens"], round(cell["median_ns"])]
                for model, cells in probe["cells"].items()
                for cell in cells
            ]
            for sms, probe in sorted(parts.items())
        },
    }  # fmt: skip
    write_text(out, _lines(content))


def _lines(content: Mapping[str, Any]) -> str:
    """JSON with a line for each entry of a list."""
    text = json.dumps(content)
    return re.sub(r"(?<=[\]}\[]), ?(?=\[)|(?<=\[)(?=\[)", lambda found: found[0].rstrip() + "\n ", text) + "\n"


def _key(entry: Mapping[str, Any]) -> Product:
    return entry["n"], entry["k"], entry["rows"]


def _products(probe: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    return (entry for entry in probe.get("kernels", ()) if NAME.match(entry["kernel"]))


def _profiled(probe: Mapping[str, Any]) -> dict[Product, float]:
    """Products that were timed by the profiler alone: the faster of two runs, with adding their shares."""
    known = {_key(entry) for entry in probe["gemm"]}
    found: dict[Product, dict[str, float]] = {}
    for entry in probe.get("kernels", ()):
        if (key := _key(entry)) not in known:
            times = found.setdefault(key, {})
            times[entry["kernel"]] = min(times.get(entry["kernel"], entry["us"]), entry["us"])
    return {key: sum(times.values()) for key, times in sorted(found.items())}


def _decode_context(cell: Mapping[str, Any]) -> int:
    """Of a cell's decoding rows beside prompts: as its key tells it, `.../0+64x500`."""
    return int(cell["key"].rpartition("x")[2]) if cell["decodes"] else 0


@dataclass(frozen=True)
class Timings:
    """What was measured: plans of products without their times, products, and forwards."""

    plans: Mapping[Product, Plan]
    products: Timed
    forwards: Mapping[int, Sequence[tuple[str, Cell, float]]]

    @classmethod
    def read(cls, path: Path) -> Timings:
        content = json.loads(path.read_text(encoding="utf-8"))
        plans = {(n, k, rows): plan_by_name(n, rows, name, grid) for n, k, rows, name, grid in content["kernels"]}
        products: Timed = {}
        for sms, entries in content["products_us"].items():
            for n, k, rows, us in entries:
                products.setdefault((n, k, rows), []).append((int(sms), us))
        forwards = {
            int(sms): [
                (
                    model,
                    Cell("sync" if chunk else "async", not chunk, seqs, context, chunk, decodes, at, STEPS[chunk > 0]),
                    ns,
                )
                for model, seqs, context, chunk, decodes, at, _, ns in entries
            ]
            for sms, entries in content["forwards_ns"].items()
        }
        return cls(plans, products, forwards)


def errors(
    timings: Timings, by: Rules, profiles: Mapping[str, Profile], parts: Sequence[int]
) -> dict[tuple[int, str, str], float]:
    """Log errors of forwards on parts over those on the whole, by part, model and cell."""
    whole = {(model, cell): ns for model, cell, ns in timings.forwards[WHOLE]}
    found = {}
    for sms in parts:
        for name, profile in profiles.items():
            pair = Pair(DEVICE, DEVICE.cut(sms), by, 1, DecoderForwards(MODELS[name]))
            fit = profile.device.prefill
            part = prefill_on(fit, pair)
            for model, cell, ns in timings.forwards[sms]:
                if model != name or (cell.chunk and cell.num_tokens < SHORT_TOKENS):
                    continue
                if cell.chunk:
                    at = (
                        cell.num_tokens, cell.pairs(fit.tile), cell.context + cell.chunk, cell.decodes, cell.kv_tokens
                    )  # fmt: skip
                    ratio = part.at(*at) / fit.at(*at)
                else:
                    ratio = pair.ratio(partial(pair.forwards.decode, cell.num_seqs, cell.kv_tokens))
                found[sms, model, cell.key] = log(ratio / (ns / whole[model, cell]))
    return found


def decode_errors(timings: Timings, by: Rules, parts: Sequence[int]) -> Iterator[float]:
    """Log errors of forwards that only decode, in nanoseconds, not relative to the whole device."""
    for sms in parts:
        device = DEVICE if sms == WHOLE else DEVICE.cut(sms)
        for model, cell, ns in timings.forwards[sms]:
            if not cell.chunk:
                kernels = DecoderForwards(MODELS[model]).decode(cell.num_seqs, cell.kv_tokens, 1)
                yield log(by.forward_ns(kernels, device, "bf16", measured=True) / ns)


def fit_law(timings: Timings, start: Rules, profiles: Mapping[str, Profile], parts: Sequence[int], most: int) -> Law:
    """The constants that fit the forwards on `parts` best; `most`: steps of the search."""
    names = list(FITTED)
    low, high = (np.array([FITTED[name][side] for name in names]) for side in (0, 1))
    first = np.clip([getattr(start.law, name) for name in names], low + 1e-3, high - 1e-3)

    def law_at(point: Floats) -> Law:
        return start.law.model_copy(update=dict(zip(names, map(float, point), strict=True)))

    def residuals(point: Floats) -> Floats:
        by = Rules(law_at(point), start.plans)
        told = errors(timings, by, profiles, parts)
        # The smallest parts are furthest from any that is used, and prompts fewer than decodes.
        relative = [
            error * (0.5 if sms < SMALL else 1.0) * (1.5 if "/prefill/" in key else 1.0)
            for (sms, _, key), error in told.items()
        ]
        # What is a latency, and what is not, the forwards themselves tell better than what they gain and lose.
        return np.array([*relative, *(WHOLE_WEIGHT * error for error in decode_errors(timings, by, (*parts, WHOLE)))])

    scale = np.maximum(first, 0.05 * high)
    found = least_squares(
        residuals,
        first,
        x_scale=scale,
        bounds=(low, high),
        loss="soft_l1",
        f_scale=0.04,
        diff_step=[0.02] * len(names),
        max_nfev=most,
    )
    return law_at(found.x)


@app.command()
def law(
    file: Annotated[Path, typer.Argument(help="The timings, JSON.")] = TIMINGS,
    steps: Annotated[int, typer.Option(help="Steps of the search for the constants.")] = 8,
    leave_out: Annotated[bool, typer.Option(help="Also fit without each part, and tell its errors.")] = True,
) -> None:
    """Fit the constants, and tell by how much forwards on each part are missed by a fit without that part."""
    timings = Timings.read(file)
    profiles = {name: load_profile(profile) for name, profile in PROFILES.items()}
    parts = [sms for sms in sorted(timings.forwards) if sms != WHOLE]
    fitted = _fitted(timings, rules().law, profiles, parts, steps)
    told = errors(timings, fitted, profiles, parts)
    if leave_out:
        told = {}
        for sms in parts:
            others = [other for other in parts if other != sms]
            left = _fitted(timings, fitted.law, profiles, others, max(steps // 3, 2), without=sms)
            told |= errors(timings, left, profiles, [sms])
            typer.echo(_told(told, sms), err=True)
    for sms in parts:
        typer.echo(_told(told, sms))
    content = json.loads(file.read_text(encoding="utf-8"))["provenance"]
    command = "python -m calibration.hardware.fit law"
    kept = {key: value for key, value in fitted.law.provenance.items() if key == "link"}
    update = {"provenance": {**content, "fit": command, **kept}, "spread": spreads(told, fitted.law)}
    constants = fitted.law.model_copy(update=update).model_dump(mode="json")
    write_text(PLACE / "law.json", json.dumps({k: _rounded(v) for k, v in constants.items()}, indent=1) + "\n")


def _fitted(
    timings: Timings, law: Law, profiles: Mapping[str, Profile], parts: Sequence[int], steps: int, without: int = 0
) -> Rules:
    """Tiles for the constants, constants for the tiles, and tiles again; all of it kept where nothing is left out."""
    plans = read_plans(products_text(timed_plans(timings.plans, timings.products, law, without)))
    law = fit_law(timings, Rules(law, plans), profiles, parts, steps)
    timed = timed_plans(timings.plans, timings.products, law, without)
    if not without:
        write_text(PLACE / "products.json", products_text(timed))
    return Rules(tile_law(timed, law), read_plans(products_text(timed)))


def _told(told: Mapping[tuple[int, str, str], float], sms: int) -> str:
    line = f"{sms:4d} multiprocessors:"
    for kind in ("decode", "prefill"):
        found = np.array([error for (at, _, key), error in told.items() if at == sms and f"/{kind}/" in key])
        line += f"  {kind} {len(found)} forwards, mean {found.mean():+.1%}, median {np.median(abs(found)):.1%}"
        line += f", largest {abs(found).max():.1%}"
    return line


def spreads(told: Mapping[tuple[int, str, str], float], law: Law) -> dict[str, dict[str, Any]]:
    """The law's spreads with those of parts as they were found: for any part, and more for each halving."""
    found: dict[str, Any] = dict(law.spread["part"])
    for kind in ("decode", "prefill"):
        errors = [(log(WHOLE / sms) / log(2), error) for (sms, _, key), error in told.items() if f"/{kind}/" in key]
        base = float(np.mean([error**2 for halvings, error in errors if halvings < 0.75]))
        more = [max(error**2 - base, 0.0) / halvings**2 for halvings, error in errors if halvings >= 0.75]
        found[kind] = (round(base**0.5, 4), round(float(np.mean(more)) ** 0.5, 4))
    return {**law.spread, "part": found}


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(app())
