"""Measured costs of one model on one machine: read, check, interpolate, draw.

A profile is measured by the calibrator, never typed in. It holds the cells as they were measured (quantiles and
counts), what was fitted to them, the fits' residuals, and where all of it comes from.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from zlib import crc32

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)  # fmt: skip

from batchsim.batching.continuous import Batch
from batchsim.errors import InputError
from batchsim.machine import Burst, Latencies
from batchsim.operations import HOST_PHASES

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _rising(values: list[int]) -> list[int]:
    if any(before >= after for before, after in pairwise(values)):
        raise ValueError("the values must rise")
    return values


Rising = Annotated[list[int], Field(min_length=2), AfterValidator(_rising)]


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class PhaseFit(_Model):
    """Host time of one phase, nanoseconds: linear in what the batch holds, times a ratio drawn per step.

    `ratios` are the means of equal-count bins of measured over fitted time, so that their mean is the measured
    one. Samples beyond the outlier bound take no part in fit or ratios; they are counted, with their total.
    """

    step_ns: NonNegativeFloat
    seq_ns: NonNegativeFloat = 0.0
    prefill_token_ns: NonNegativeFloat = 0.0
    admitted_ns: NonNegativeFloat = 0.0
    ratios: Annotated[list[NonNegativeFloat], Field(min_length=1)]
    samples: PositiveInt
    outliers: int
    outlier_ns: NonNegativeFloat
    residuals: dict[str, FiniteFloat]

    def mean_ns(self, num_seqs: int, prefill_tokens: int = 0, admitted: int = 0) -> float:
        """Expected host time for a batch of `num_seqs` sequences, `admitted` of them new to it."""
        linear = self.step_ns + self.seq_ns * num_seqs
        linear += self.prefill_token_ns * prefill_tokens + self.admitted_ns * admitted
        return linear * sum(self.ratios) / len(self.ratios)


class LoopFit(_Model):
    """One loop (a schedule, with or without graphs): its host phases and the machine's fixed delays in it."""

    phases: dict[str, PhaseFit]
    kernel_launch: PhaseFit
    launch_ns: NonNegativeInt
    copy_ns: NonNegativeInt
    event_ns: NonNegativeInt
    gap_ns: NonNegativeInt
    wake_up_ns: NonNegativeInt
    copy_in_device_ns: NonNegativeInt
    copy_out_device_ns: NonNegativeInt

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if missing := set(HOST_PHASES) - {"launch"} - set(self.phases):
            raise ValueError(f"phases lack {', '.join(sorted(missing))}")
        return self


def _pair(xs: Sequence[int], ns: Sequence[float]) -> None:
    if len(xs) != len(ns):
        raise ValueError(f"{len(xs)} points have {len(ns)} times")


class DecodeCurve(_Model):
    """Device time of a decode forward padded to `size` rows, by the sum of the rows' contexts."""

    size: PositiveInt
    kv_tokens: Rising
    ns: list[Positive]

    @model_validator(mode="after")
    def _paired(self) -> Self:
        _pair(self.kv_tokens, self.ns)
        return self

    def at(self, kv_tokens: float) -> float:
        """Nanoseconds; piecewise linear, the end segments going on."""
        return _line(kv_tokens, self.kv_tokens, self.ns)


class PrefillFit(_Model):
    """Device time of a forward with prompt tokens: `ns` at `num_tokens` new tokens, and more for attention.

    Prompts add `pair_ns` for each (query, key) pair, counted in whole tiles of `tile` queries, and `depth_ns` for each
    token of the longest, which one tile has to go through alone; decoding rows beside them add `mixed_ns` once,
    `row_ns` each and `kv_ns` for each token of their contexts.
    """

    tile: PositiveInt
    num_tokens: Rising
    ns: list[NonNegativeFloat]
    pair_ns: NonNegativeFloat
    depth_ns: NonNegativeFloat
    mixed_ns: NonNegativeFloat
    row_ns: NonNegativeFloat
    kv_ns: NonNegativeFloat
    residuals: dict[str, FiniteFloat]

    @model_validator(mode="after")
    def _paired(self) -> Self:
        _pair(self.num_tokens, self.ns)
        return self

    def at(self, num_tokens: int, pairs: int, depth: int, decodes: int, kv_tokens: int) -> float:
        """Nanoseconds of a forward of `num_tokens` new tokens, `decodes` of them of decoding rows."""
        ns = _line(num_tokens, self.num_tokens, self.ns) + self.pair_ns * pairs + self.depth_ns * depth
        return ns + self.mixed_ns + self.row_ns * decodes + self.kv_ns * kv_tokens if decodes else ns


class DeviceFit(_Model):
    """Device time of a forward.

    `eager_factor` is the kernel time of a forward that is launched kernel by kernel over the graph's;
    `outer_share` the part of it that the kernels outside the layers take, nearly all of it the LM head.
    """

    decode: Annotated[list[DecodeCurve], Field(min_length=1)]
    prefill: PrefillFit
    eager_factor: Positive
    outer_share: Annotated[float, Field(ge=0, lt=1)]
    decode_ratios: Annotated[list[Positive], Field(min_length=1)]
    prefill_ratios: Annotated[list[Positive], Field(min_length=1)]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _rising([curve.size for curve in self.decode])
        return self

    def beyond_ns(self, rows: int) -> float:
        """What a decode forward of `rows` rows takes longer than the largest measured: as between the last two."""
        last, before = self.decode[-1], self.decode[max(len(self.decode) - 2, 0)]
        if rows <= last.size or last is before:
            return 0.0
        return (last.at(0) - before.at(0)) / (last.size - before.size) * (rows - last.size)


class KernelCounts(_Model):
    """Launches of a forward without graphs: before the layers, in each layer, and after them.

    Up to `split_rows` decoding rows each layer has one launch more: attention split over the context, and the sum.
    """

    first: PositiveInt
    layers: PositiveInt
    per_layer: PositiveInt
    last: PositiveInt
    split_rows: int

    def total(self, decode_rows: int) -> int:
        """Launches of a forward that decodes `decode_rows` rows, padding included; 0: it only prefills."""
        return self.first + self.layers * self._in_layer(decode_rows) + self.last

    def bursts(self, decode_rows: int, launch_ns: float, device_ns: float, outer_share: float) -> tuple[Burst, ...]:
        """A forward of `device_ns` kernel time, each launch taking the host `launch_ns`.

        The layers' kernels share their part evenly; the first after the layers, the LM head, takes the rest.
        """
        count = self._in_layer(decode_rows)
        host, each = round(launch_ns), round(device_ns * (1 - outer_share) / (self.layers * count))
        layer = Burst((host,) * count, (each,) * count)
        last = Burst((host,) * self.last, (round(device_ns * outer_share), *(0,) * (self.last - 1)))
        return (Burst((host,) * self.first, (0,) * self.first), *(layer,) * self.layers, last)

    def _in_layer(self, decode_rows: int) -> int:
        return self.per_layer + (0 < decode_rows <= self.split_rows)


def forward_ns(bursts: Sequence[Burst]) -> int:
    """From the first kernel's start to the last one's end on an idle device."""
    ready = end = 0
    for burst in bursts:
        for host_ns, device_ns in zip(burst.host_ns, burst.device_ns, strict=True):
            end = max(end, ready) + device_ns
            ready += host_ns
    return end


class Profile(_Model):
    """Everything measured for one model on one machine. Loops are named `sync/graph`, `async/eager` and so on.

    `overlaps` says whether the device computes while the host goes on; on a CPU a launch is the forward itself.
    """

    schema_version: Literal[1]
    kind: Literal["profile"]
    name: str
    model: str
    provenance: dict[str, Any]
    device_memory_bytes: int
    overlaps: bool
    kernels: KernelCounts
    loops: dict[str, LoopFit]
    device: DeviceFit
    copies: list[dict[str, Any]]
    cells: list[dict[str, Any]]


def _line(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Piecewise linear through the points, the end segments going on."""
    i = min(max(bisect_right(xs, x), 1), len(xs) - 1)
    return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])


def load_profile(name: str, base: Path | None = None) -> Profile:
    """Read a shipped profile by name, or any by the path of its JSON, relative to `base`.

    Raises:
        InputError: no such profile, or a file that is not one.
    """
    shipped = files("calibration") / "profiles"
    path = (base or Path()) / name
    if not path.is_file():
        resource = shipped / f"{name}.json"
        if not resource.is_file():
            known = sorted(
                entry.name.removesuffix(".json") for entry in shipped.iterdir() if entry.name.endswith(".json")
            )
            raise InputError(str(path), "profile", repr(name), f"a JSON file or one of: {', '.join(known)}")
        text, source = resource.read_text(encoding="utf-8"), resource.name
    else:
        source = str(path)
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise InputError(source, "", "bytes that are no text", "a profile in JSON") from None
    try:
        return Profile.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "profile"
        raise InputError(source, key, repr(first["input"])[:80], first["msg"]) from None


class Draws:
    """Endless draws from equal-count bins, from a stream of its own.

    The stream is `SeedSequence(seed, spawn_key=(replication, crc32(name)))`: a new component shifts no other's
    draws, and all schedules of a comparison see the same ones.
    """

    def __init__(self, values: Sequence[float], *, seed: int, replication: int, name: str) -> None:
        sequence = np.random.SeedSequence(seed, spawn_key=(replication, crc32(name.encode())))
        self._rng = np.random.Generator(np.random.PCG64(sequence))
        self._values = np.asarray(values, dtype=np.float64)
        self._drawn: Iterator[float] = iter(())

    def next(self) -> float:
        for value in self._drawn:
            return value
        self._drawn = iter(self._values[self._rng.integers(0, len(self._values), 4096)].tolist())
        return next(self._drawn)


class ProfileCosts:
    """The costs of one loop of a profile, for the simulated machine.

    `host_speed` is the speed of one host thread relative to the profile's machine. With `jitter` every step
    draws its costs from the measured distribution; without, it pays their means.
    """

    def __init__(
        self,
        profile: Profile,
        schedule: str,
        *,
        graphs: bool,
        host_speed: float = 1.0,
        jitter: bool = True,
        seed: int = 0,
        replication: int = 0,
    ) -> None:
        self.loop = profile.loops[f"{schedule}/{'graph' if graphs else 'eager'}"]
        self.device = profile.device
        self.graphs = graphs
        self.overlaps = profile.overlaps
        self._extrapolated: dict[str, tuple[int, int]] = {}
        self._scale = 1 / host_speed
        self._jitter = jitter
        self._streams = {"seed": seed, "replication": replication}
        self._draws: dict[str, Draws] = {}
        self._kernels = profile.kernels
        loop = self.loop
        self.latencies = Latencies(
            launch_ns=round(loop.launch_ns * self._scale) if profile.overlaps else 0,
            copy_ns=round(loop.copy_ns * self._scale),
            event_ns=loop.event_ns,
            gap_ns=loop.gap_ns,
            wake_up_ns=round(loop.wake_up_ns * self._scale),
        )

    def host_ns(self, phase: str, batch: Batch | None) -> int:
        """See `batchsim.machine.Costs`."""
        return self._host_time(phase, self.loop.phases[phase], batch)

    def copy_ns(self, phase: str, batch: Batch) -> int:  # noqa: ARG002
        """See `batchsim.machine.Costs`."""
        return self.loop.copy_in_device_ns if phase == "copy_in" else self.loop.copy_out_device_ns

    def launch(self, batch: Batch) -> Sequence[Burst]:
        """See `batchsim.machine.Costs`: one burst for a graph, else one a layer and one before and after them."""
        if not self.overlaps:
            forward_ns = self.prefill_ns(batch) if batch.prefill_tokens else self.decode_ns(batch)
            return (Burst((forward_ns,), (forward_ns,)),)
        if self.graphs and not batch.prefill_tokens:
            host_ns = self._host_time("launch", self.loop.phases["launch"], batch)
            return (Burst((host_ns,), (self.decode_ns(batch),)),)
        launch_ns = self._host_time("kernel_launch", self.loop.kernel_launch, None)
        if batch.prefill_tokens:
            # The LM head, over the sampled rows alone, is next to nothing beside the prompts' tokens.
            rows = batch.num_tokens - batch.prefill_tokens
            return self._kernels.bursts(rows, launch_ns, self.prefill_ns(batch), 0.0)
        device_ns = self.decode_ns(batch) * self.device.eager_factor
        return self._kernels.bursts(self._curve(batch.num_seqs).size, launch_ns, device_ns, self.device.outer_share)

    def decode_ns(self, batch: Batch) -> int:
        """Device time of a decode forward, nanoseconds."""
        curve = self._curve(batch.num_seqs)
        kv_tokens = batch.kv_tokens
        low, high = curve.kv_tokens[0], curve.kv_tokens[-1]
        if not low * 0.5 <= kv_tokens <= high * 1.02:
            self._note(f"decode of {curve.size} rows (measured up to {high} tokens of context in all)", kv_tokens)
        ns = curve.at(kv_tokens) + self.device.beyond_ns(batch.num_seqs)
        return round(ns * self._ratio("decode", self.device.decode_ratios))

    def prefill_ns(self, batch: Batch) -> int:
        """Device time of a forward with prompt tokens, nanoseconds."""
        fit = self.device.prefill
        if batch.num_tokens > fit.num_tokens[-1]:
            self._note(f"prefill (measured up to {fit.num_tokens[-1]} tokens)", batch.num_tokens)
        decodes = batch.num_tokens - batch.prefill_tokens
        ns = fit.at(batch.num_tokens, batch.prefill_pairs(fit.tile), batch.prefill_depth, decodes, batch.kv_tokens)
        return round(ns * self._ratio("prefill", self.device.prefill_ratios))

    def _curve(self, num_seqs: int) -> DecodeCurve:
        for curve in self.device.decode:
            if curve.size >= num_seqs:
                return curve
        self._note(f"decode (measured up to {self.device.decode[-1].size} rows)", num_seqs)
        return self.device.decode[-1]

    def extrapolated(self) -> list[str]:
        """What was asked for outside the measured range, a sentence each; empty where nothing was."""
        return [f"{what}: extrapolated to {low}..{high}" for what, (low, high) in sorted(self._extrapolated.items())]

    def _note(self, what: str, value: int) -> None:
        low, high = self._extrapolated.get(what, (value, value))
        self._extrapolated[what] = min(low, value), max(high, value)

    def _ratio(self, name: str, ratios: Sequence[float]) -> float:
        if not self._jitter:
            return sum(ratios) / len(ratios)
        if name not in self._draws:
            self._draws[name] = Draws(ratios, name=name, **self._streams)
        return self._draws[name].next()

    def _host_time(self, name: str, fit: PhaseFit, batch: Batch | None) -> int:
        ns = fit.step_ns
        if batch is not None:  # None: a scheduling call that found nothing to run
            ns += fit.seq_ns * batch.num_seqs
            if batch.prefill_tokens:
                ns += fit.prefill_token_ns * batch.prefill_tokens + fit.admitted_ns * batch.admitted
        return round(ns * self._ratio(name, fit.ratios) * self._scale)
