"""How long a kernel takes on a device: waves of blocks over its multiprocessors.

A kernel takes a latency and then wave after wave. A wave takes the norm of two times: what a block needs that has the
memory to itself, and what the memory needs for the bytes of all the blocks that run at once. Where a matrix product's
tiles were recorded (`products.json`), so were what a tile needs and what the whole product takes on the whole device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from importlib.resources import files
from math import isclose
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat

from batchsim.hardware.catalogue import Device, device_of
from batchsim.hardware.kernels import FLOAT32, Kernel
from batchsim.hardware.plans import Plan, Plans, plan_of, read_plans

NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Link(BaseModel):
    """A way to sum over devices: what it takes at least, and the share of the link's bandwidth that it reaches."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    latency_ns: PositiveFloat
    efficiency: PositiveFloat


class Law(BaseModel):
    """Constants of the law, fitted on a device whose clock is `clock_mhz`; times are of that clock.

    product_latency_ns, attention_latency_ns, rows_latency_ns: of a kernel, with the gap before it.
    memory_efficiency: share of the data sheet's bandwidth that is reached.
    overlap: order of the norm that joins a block's own time and the memory's; attention_overlap: that of attention.
    matrix_efficiency, tile_ns, tile_bytes_per_ns: of a tile that was not recorded, the share of the data sheet's rate
        that it reaches, what it takes more, and what one multiprocessor loads.
    split_ns, split_passes: adding the shares of a product whose depth is split, and how often that reads them.
    attention_blocks: blocks of decode attention that share a multiprocessor; attention_block_ns,
        attention_bytes_per_ns: what one takes, and draws.
    rows_bytes_per_ns: what a multiprocessor draws for kernels over rows.
    full_clock: share of a device's matrix units that may be busy before its power lowers the clock.
    power_order: of the clock, with which power grows.
    link: ways to sum over two devices, of which the fastest is taken.
    spread: relative standard deviations, by what the target is and by part: of any transfer, and for each halving or
        doubling of what changes most. Those of a part of the device are what fits without a part missed it by; of other
        devices nothing was measured.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    clock_mhz: PositiveFloat
    product_latency_ns: NotNegative
    attention_latency_ns: NotNegative
    rows_latency_ns: NotNegative
    memory_efficiency: PositiveFloat
    overlap: PositiveFloat
    matrix_efficiency: PositiveFloat
    tile_ns: NotNegative
    tile_bytes_per_ns: PositiveFloat
    split_ns: NotNegative
    split_passes: NotNegative
    attention_blocks: PositiveFloat
    attention_block_ns: NotNegative
    attention_bytes_per_ns: PositiveFloat
    attention_overlap: PositiveFloat
    rows_bytes_per_ns: PositiveFloat
    full_clock: PositiveFloat
    power_order: PositiveFloat
    link: list[Link]
    spread: dict[str, dict[str, tuple[NotNegative, NotNegative]]]
    provenance: dict[str, Any] = {}


@dataclass(frozen=True, eq=False)
class Rules:
    """The law, and how products were recorded to be tiled."""

    law: Law
    plans: Plans

    @cached_property
    def measured_on(self) -> Device | None:
        """The device that the law's constants and the products' tiles are of."""
        return device_of(self.law.provenance)

    def forward_ns(
        self, kernels: Iterable[Kernel], device: Device, dtype: str, devices: int = 1, *, measured: bool = False
    ) -> float:
        """Nanoseconds of a forward on a device, one of so many that share the model.

        Where its matrix units are so busy that its power lowers the clock, tiles take longer. `measured`: a recorded
        product on the whole device takes what was measured.
        """
        found = tuple(kernels)
        ns = View(self, device, dtype, devices, measured).total_ns(found)
        clock = self._clock(found, device, dtype, ns)
        return ns if clock == 1.0 else View(self, device, dtype, devices, measured, clock).total_ns(found)

    def _clock(self, kernels: Iterable[Kernel], device: Device, dtype: str, ns: float) -> float:
        flops = sum(kernel.count * kernel.flops for kernel in kernels if kernel.kind == "product")
        if not flops:
            return 1.0
        busy = flops / (ns * device.matrix_rate(dtype) * 1e3) * device.sms / device.planned
        law = self.law
        return 1.0 if busy <= law.full_clock else float((law.full_clock / busy) ** (1 / law.power_order))


@dataclass(frozen=True)
class View:
    """The law for one device at a share `clock` of its clock."""

    rules: Rules
    device: Device
    dtype: str
    devices: int
    measured: bool
    clock: float = 1.0

    @property
    def law(self) -> Law:
        return self.rules.law

    def total_ns(self, kernels: Iterable[Kernel]) -> float:
        return sum(kernel.count * self.kernel_ns(kernel) for kernel in kernels)

    @lru_cache(maxsize=1 << 14)  # noqa: B019 (a forward's products are those of many others)
    def kernel_ns(self, kernel: Kernel) -> float:
        """Nanoseconds of one launch, the gap before it included."""
        law, slower = self.law, self.law.clock_mhz / self.device.clock_mhz
        match kernel.kind:
            case "product":
                return self._product_ns(kernel)
            case "attention":
                block = kernel.size_bytes / kernel.blocks
                taken = max(kernel.block_bytes, block)
                own = law.attention_block_ns * slower + taken / (law.attention_bytes_per_ns / slower)
                own = max(own, kernel.flops / kernel.blocks * law.attention_blocks / self._rate)
                slots = max(1, int(law.attention_blocks * self.device.sms))
                found = waves(kernel.blocks, kernel.blocks, slots)
                order = law.attention_overlap
                ns = sum(n * self._wave_ns(own, a * block, order) for n, a in found)
                return law.attention_latency_ns * slower + ns
            case "rows":
                drawn = self.device.sms * law.rows_bytes_per_ns / slower
                beyond = kernel.size_bytes > self.device.l2_bytes
                own = kernel.size_bytes / drawn
                return law.rows_latency_ns * slower + (self._wave_ns(own, kernel.size_bytes) if beyond else own)
            case "reduce":
                return self._reduce_ns(kernel)

    def _product_ns(self, kernel: Kernel) -> float:
        plan = plan_of(kernel, self.device, self.rules.plans, self._estimated)
        ns = self.planned_ns(kernel, plan)
        if not (self.measured and plan.whole_ns):
            return ns
        if self.device.sms < self.device.planned:
            return max(ns, plan.whole_ns)  # a part is no faster
        return plan.whole_ns * ns / replace(self, clock=1.0).planned_ns(kernel, plan)

    def planned_ns(self, kernel: Kernel, plan: Plan) -> float:
        """Nanoseconds of a product that is tiled so."""
        law, slower = self.law, self.law.clock_mhz / self.device.clock_mhz
        own = self._recorded_ns(kernel, plan) if plan.tile_ns else self._tile_ns(kernel, plan)
        ns = law.product_latency_ns * slower + self._tiles_ns(kernel, plan, own / self.clock)
        if plan.shares > 1:
            moved = kernel.rows * kernel.columns * FLOAT32 * plan.shares * law.split_passes
            ns += law.split_ns * slower + moved / self._bandwidth
        return ns

    def _tiles_ns(self, kernel: Kernel, plan: Plan, own: float) -> float:
        """All waves of a product's tiles, each of which takes `own` where it has the memory to itself."""
        sms, tile = self.device.sms, kernel.size_bytes / plan.tiles
        cluster = min(plan.cluster, sms)
        found = waves(plan.tiles, plan.blocks, sms // cluster * cluster)
        return sum(n * self._wave_ns(own, a * tile) for n, a in found)

    def _estimated(self, kernel: Kernel, plan: Plan) -> float:
        """What a product would take with a plan on the device that it is made for."""
        ns = self._tiles_ns(kernel, plan, self._tile_ns(kernel, plan))
        if plan.shares > 1:
            ns += self.law.split_ns + kernel.rows * kernel.columns * FLOAT32 * plan.shares / self._bandwidth
        return ns

    def _tile_ns(self, kernel: Kernel, plan: Plan) -> float:
        law, depth = self.law, kernel.depth / plan.shares
        arithmetic = 2.0 * max(plan.rows, 16) * plan.columns * depth / self._rate
        loads = kernel.element_bytes * (plan.rows + plan.columns) * depth / law.tile_bytes_per_ns
        slower = law.clock_mhz / self.device.clock_mhz
        return law.tile_ns * slower + max(arithmetic, loads * slower)

    def _recorded_ns(self, kernel: Kernel, plan: Plan) -> float:
        """A tile that was recorded: by the clock, and by its arithmetic where the matrix units are others."""
        slower, known = self.law.clock_mhz / self.device.clock_mhz, self.rules.measured_on
        if known is None:
            return plan.tile_ns * slower
        there = replace(self, device=known, devices=1, clock=1.0)
        if isclose(self._rate * slower, there._rate):
            return plan.tile_ns * slower
        return plan.tile_ns * self._tile_ns(kernel, plan) / there._tile_ns(kernel, plan)

    @property
    def _rate(self) -> float:
        """FLOP per nanosecond of one multiprocessor's matrix units."""
        return self.device.matrix_rate(self.dtype) * 1e3 * self.law.matrix_efficiency / self.device.sms

    @property
    def _bandwidth(self) -> float:
        """Bytes per nanosecond of the device's memory."""
        return self.device.memory_gb_per_s * self.law.memory_efficiency

    def _wave_ns(self, own: float, size_bytes: float, order: float = 0.0) -> float:
        order = order or self.law.overlap
        return float((own**order + (size_bytes / self._bandwidth) ** order) ** (1 / order))

    def _reduce_ns(self, kernel: Kernel) -> float:
        """An all-reduce in a ring: NCCL's way for few bytes, or that for many, over NVLink or PCIe."""
        device, devices = self.device, self.devices
        # Twice as long a way through the host's memory; a round more for each doubling of the devices.
        links = [(device.nvlink_gb_per_s, 1), (device.pcie_gb_per_s, 2)]
        further = (1 + (devices - 1).bit_length()) / 2
        moved = 2 * (devices - 1) / devices * kernel.size_bytes
        return min(
            way.latency_ns * (hops * further) + moved / (link * way.efficiency)
            for way in self.law.link
            for link, hops in links
            if link
        )


def waves(tiles: int, blocks: int, slots: int) -> Iterator[tuple[int, int]]:
    """Waves of a kernel whose `blocks` share `tiles` tiles, on so many slots: how many waves of how many tiles.

    Each block begins with a tile of its own and then takes the next that no block has begun with. Blocks that found no
    slot begin when all other tiles are done: so cuBLAS's kernels behave on a part of a device (nvjet, CUDA 13).
    """
    slots = max(slots, 1)
    late = max(blocks - slots, 0)
    for count in (tiles - late, late):
        if count >= slots:
            yield count // slots, slots
        if count % slots:
            yield 1, count % slots


@cache
def rules() -> Rules:
    """The law with the constants that were fitted, and the products that were recorded."""
    place = files("batchsim.hardware")
    law = Law.model_validate_json(place.joinpath("law.json").read_text(encoding="utf-8"))
    return Rules(law, read_plans(place.joinpath("products.json").read_text(encoding="utf-8")))
