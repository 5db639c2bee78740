"""Fit the law's sums over devices to what the link of a pair of them was measured to take.

python -m calibration.hardware.fit_link calibration/validation/hardware/link/h200-pair.json
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from scipy.optimize import least_squares

from batchsim.files import write_text
from batchsim.hardware import device_of
from batchsim.hardware.law import Link, rules

LAW = Path(__file__).parents[2] / "batchsim" / "hardware" / "law.json"
# Few bytes and many: latency in ns, and share of the bandwidth.
START = (6000.0, 0.3, 15_000.0, 0.6)

Floats = NDArray[np.float64]


def fit(sizes: Floats, times_ns: Floats, bytes_per_ns: float) -> tuple[Link, Link]:
    """The two ways, by least squares of the log errors; of a pair of devices each byte crosses the link once."""

    def errors(point: Floats) -> Floats:
        small, large = (point[i] + sizes / (bytes_per_ns * point[i + 1]) for i in (0, 2))
        found: Floats = np.log(np.minimum(small, large) / times_ns)
        return found

    bounds = ([100.0, 0.01, 100.0, 0.01], [1e5, 1.0, 1e5, 1.0])
    found = least_squares(errors, START, x_scale=START, bounds=bounds, loss="soft_l1", f_scale=0.1).x
    ways = [Link(latency_ns=float(found[i]), efficiency=float(found[i + 1])) for i in (0, 2)]
    return ways[0], ways[1]


def main(file: Annotated[Path, typer.Argument(help="What `tensor_parallel link` wrote.")]) -> None:
    """Replace the law's ways to sum, and tell by how much they miss what was measured."""
    found = json.loads(file.read_text(encoding="utf-8"))
    device = device_of(found["provenance"])
    if device is None or found["provenance"].get("devices") != 2:
        raise typer.BadParameter("the link of a pair of devices in the catalogue is needed")
    entries = [(entry["bytes"], entry["marginal_us"] * 1e3) for entry in found["all_reduce"]]
    assert all(before < after for (before, _), (after, _) in pairwise(entries))
    sizes, times = (np.array(column, np.float64) for column in zip(*entries, strict=True))
    ways = fit(sizes, times, device.nvlink_gb_per_s or device.pcie_gb_per_s)
    rates = device.nvlink_gb_per_s or device.pcie_gb_per_s
    modelled = np.minimum(*(way.latency_ns + sizes / (rates * way.efficiency) for way in ways))
    for size, measured_ns, law_ns in zip(sizes, times, modelled, strict=True):
        typer.echo(f"{size:12,.0f} bytes: {measured_ns / 1e3:8.1f} us, {law_ns / measured_ns - 1:+.1%}")
    content = json.loads(LAW.read_text(encoding="utf-8"))
    content["link"] = [{"latency_ns": round(way.latency_ns, 1), "efficiency": round(way.efficiency, 4)} for way in ways]
    content["provenance"]["link"] = {**found["provenance"], "fit": f"python -m calibration.hardware.fit_link {file}"}
    write_text(LAW, json.dumps(content, indent=1) + "\n")
    rules.cache_clear()


if __name__ == "__main__":
    typer.run(main)
