"""Measured costs of one model on one machine: read, check, interpolate.

A profile is measured by the calibrator, never typed in. It holds the cells as they were measured (quantiles and
counts), what was fitted to them, the fits' residuals, and where all of it comes from.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

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

from batchsim.errors import InputError
from batchsim.operations import HOST_PHASES
from batchsim.shipped import read_profile
from batchsim.streams import Burst

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
AnyProfile = TypeVar("AnyProfile", bound=BaseModel)


def _rising(values: list[int]) -> list[int]:
    if any(before >= after for before, after in pairwise(values)):
        raise ValueError("the values must rise")
    return values


Rising = Annotated[list[int], Field(min_length=2), AfterValidator(_rising)]


class Measured(BaseModel):
    """A mapping of a profile: frozen, strict, and without unknown keys."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class PhaseFit(Measured):
    """Host time of one phase, nanoseconds: linear in what the batch holds, times a ratio drawn per step.

    `ratios` are the means of equal-count bins of measured over fitted time, so that their mean is the measured
    one. Samples beyond the outlier bound take no part in fit or ratios; they are counted, with their total.
    """

    step_ns: NonNegativeFloat
    seq_ns: NonNegativeFloat = 0.0
    prefill_token_ns: NonNegativeFloat = 0.0
    admitted_ns: NonNegativeFloat = 0.0
    token_ns: NonNegativeFloat = 0.0
    ratios: Annotated[list[NonNegativeFloat], Field(min_length=1)]
    samples: PositiveInt
    outliers: int
    outlier_ns: NonNegativeFloat
    residuals: dict[str, FiniteFloat]

    def linear_ns(self, num_seqs: int, prefill_tokens: int = 0, admitted: int = 0, num_tokens: int = 0) -> float:
        """Fitted host time for a batch of `num_seqs` sequences, `admitted` of them new to it, and of `num_tokens` in
        all; without the ratio."""
        ns = self.step_ns + self.seq_ns * num_seqs
        ns = ns + (self.prefill_token_ns * prefill_tokens + self.admitted_ns * admitted)
        return ns + self.token_ns * num_tokens

    def mean_ns(self, num_seqs: int, prefill_tokens: int = 0, admitted: int = 0, num_tokens: int = 0) -> float:
        """Expected host time of such a batch."""
        return self.linear_ns(num_seqs, prefill_tokens, admitted, num_tokens) * sum(self.ratios) / len(self.ratios)


class LoopFit(Measured):
    """One loop (a schedule, with or without graphs): its host phases and the machine's fixed delays in it.

    A copy takes the device its `..._device_ns`, and more for each sequence of the batch and each of its tokens.
    """

    phases: dict[str, PhaseFit]
    kernel_launch: PhaseFit
    launch_ns: NonNegativeInt
    copy_ns: NonNegativeInt
    event_ns: NonNegativeInt
    gap_ns: NonNegativeInt
    wake_up_ns: NonNegativeInt
    copy_in_device_ns: NonNegativeInt
    copy_out_device_ns: NonNegativeInt
    copy_in_device_seq_ns: NonNegativeFloat = 0.0
    copy_in_device_token_ns: NonNegativeFloat = 0.0
    copy_out_device_seq_ns: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if missing := set(HOST_PHASES) - {"launch"} - set(self.phases):
            raise ValueError(f"phases lack {', '.join(sorted(missing))}")
        return self


def _pair(xs: Sequence[int], ns: Sequence[float]) -> None:
    if len(xs) != len(ns):
        raise ValueError(f"{len(xs)} points have {len(ns)} times")


class DecodeCurve(Measured):
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
        return line(kv_tokens, self.kv_tokens, self.ns)


class PrefillFit(Measured):
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
        ns = line(num_tokens, self.num_tokens, self.ns) + self.pair_ns * pairs + self.depth_ns * depth
        return ns + self.mixed_ns + self.row_ns * decodes + self.kv_ns * kv_tokens if decodes else ns


class DeviceFit(Measured):
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


class KernelCounts(Measured):
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

    def bursts(
        self, decode_rows: int, launch_ns: float, device_ns: float, outer_share: float, fewer: int = 0
    ) -> tuple[Burst, ...]:
        """A forward of `device_ns` kernel time, each launch taking the host `launch_ns`; `fewer` launches a layer.

        The layers' kernels share their part evenly; the first after the layers, the LM head, takes the rest.
        """
        count = self._in_layer(decode_rows) - fewer
        host, each = round(launch_ns), round(device_ns * (1 - outer_share) / (self.layers * count))
        layer = Burst((host,) * count, (each,) * count)
        last = Burst((host,) * self.last, (round(device_ns * outer_share), *(0,) * (self.last - 1)))
        return (Burst((host,) * self.first, (0,) * self.first), *(layer,) * self.layers, last)

    def alone_ns(self, decode_rows: int, launch_ns: float, device_ns: float, outer_share: float) -> int:
        """From the first kernel's start to the last one's end of such a forward, on an idle device."""
        bursts = self.bursts(decode_rows, launch_ns, device_ns, outer_share)
        whole = Burst(tuple(chain(*(b.host_ns for b in bursts))), tuple(chain(*(b.device_ns for b in bursts))))
        return whole.alone_ns

    def _in_layer(self, decode_rows: int) -> int:
        return self.per_layer + (0 < decode_rows <= self.split_rows)


class Transfer(Measured):
    """Where the costs of a profile come from that was transferred from the device that it was measured on to another.

    `hardware` is the target's name, `tensor_parallel` how many such devices share the model. `spread`: by part (decode,
    prefill, host, copies) the relative standard deviation of what the transfer multiplied the measured times with.
    """

    source: str
    target: str
    hardware: str
    tensor_parallel: PositiveInt = 1
    spread: dict[str, NonNegativeFloat]

    @property
    def same_device(self) -> bool:
        """Whether only the host and its links are others, so that forwards take what was measured."""
        return not self.spread.get("decode")

    @property
    def sentence(self) -> str:
        """For a result's warnings."""
        devices = f"{self.tensor_parallel} x " if self.tensor_parallel > 1 else ""
        return f"transferred from {self.source} to {devices}{self.target}"


class Profile(Measured):
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
    transfer: Annotated[Transfer | None, Field(exclude_if=lambda value: value is None)] = None

    @property
    def told(self) -> dict[str, Any]:
        """What results say of where their costs come from."""
        if self.transfer is None:
            return self.provenance
        return {**self.provenance, "transfer": self.transfer.model_dump(mode="json")}


def line(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Piecewise linear through the points, the end segments going on."""
    i = min(max(bisect_right(xs, x), 1), len(xs) - 1)
    return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])


def load_profile(name: str, base: Path | None = None) -> Profile:
    """Read a shipped profile by name, or any by the path of its JSON, relative to `base`.

    Raises:
        InputError: no such profile, or a file that is not one.
    """
    wanted = "a file that `batchsim calibrate` wrote"
    text, source = read_profile(name, base or Path(), ".", what="profile", wanted=wanted)
    return parsed(Profile, text, source)


def parsed(model: type[AnyProfile], text: str, source: str) -> AnyProfile:
    """A profile of one kind from JSON text; `source` is what errors name. The same text is parsed once.

    Raises:
        InputError: it is not one.
    """
    found: AnyProfile = _parsed(model, text, source)
    return found


@lru_cache(maxsize=16)
def _parsed(model: type[BaseModel], text: str, source: str) -> Any:
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "profile"
        if first["type"] == "missing":
            raise InputError(source, key, "nothing", "the value that belongs there: the file is not whole") from None
        raise InputError(source, key, repr(first["input"])[:80], first["msg"]) from None
