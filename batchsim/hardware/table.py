"""The catalogue as a table."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.table import Table

from batchsim.hardware.catalogue import Device

COLUMNS = ("name", "SMs", "MHz", "bf16", "memory", "GB/s", "NVLink", "PCIe", "USD/h")


def print_catalogue(console: Console, catalogue: Mapping[str, Device]) -> None:
    """A row for each device; its sources are in the JSON."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for name, device in catalogue.items():
        price = "unknown" if device.price_per_hour is None else f"{device.price_per_hour:.2f}"
        table.add_row(
            name, f"{device.sms}", f"{device.clock_mhz:g}", f"{device.matrix_rate('bf16'):g}",
            f"{device.memory_bytes / 1e9:.0f}", f"{device.memory_gb_per_s:g}",
            f"{device.nvlink_gb_per_s:g}" if device.nvlink_gb_per_s else "none", f"{device.pcie_gb_per_s:g}", price,
        )  # fmt: skip
    console.print(table, "", sep="\n")
    console.print(
        "bf16: dense TFLOP/s at the boost clock; memory in GB; bandwidths in GB/s, of one direction; on-demand list "
        "prices of one device, with their sources in `batchsim hardware --json`. A scenario's `hardware` may be one of "
        "these names, or a mapping with a base and other values."
    )
