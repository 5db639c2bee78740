"""Devices and their hosts: what a catalogue holds of each, and what a scenario may write of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer
from pydantic import model_validator as validator

from batchsim.errors import one_of, shown
from batchsim.fields import Model, Text, key_of
from batchsim.hardware.catalogue import CATALOGUE, Device
from batchsim.refusal import refused

DTYPES = ("bf16", "fp16", "tf32", "fp32", "fp8", "int8")
MOST = 1e9

Rate = Annotated[float, Field(gt=0, le=MOST, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=MOST, allow_inf_nan=False)]


def _of_dtypes(rates: dict[str, float]) -> dict[str, float]:
    for dtype in rates:
        if dtype not in DTYPES:
            raise refused(shown(dtype), one_of(DTYPES))
    return rates


Rates = Annotated[dict[str, Rate], AfterValidator(_of_dtypes), Field(min_length=1)]


DeviceName = Annotated[str, AfterValidator(key_of(CATALOGUE)), Field(json_schema_extra={"enum": list(CATALOGUE)})]


class Hardware(Model):
    """The device and the host to predict for: one of the catalogue, perhaps with other values, or one's own.

    Other `sms`, or another `clock_mhz`, than the base's change its rates in proportion unless they are given. Fewer
    `sms` are a part of the base, such as a green context, for which libraries still choose the whole's kernels.
    """

    base: DeviceName | None = None
    """A device of the catalogue, whose values those given here replace; without it all are needed."""
    name: Text | None = None
    """What to call it."""
    sms: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Streaming multiprocessors; fewer than the base's are a part of it."""
    clock_mhz: Annotated[float, Field(ge=1, le=100_000, allow_inf_nan=False)] | None = None
    """Boost clock, MHz."""
    matrix_tflops: Rates | None = None
    """Dense rates of the matrix units by type (bf16, fp16, tf32, fp8, int8), TFLOP/s."""
    vector_tflops: Rates | None = None
    """Rates of the vector units by type (fp32, fp16, bf16), TFLOP/s."""
    memory_bytes: Annotated[int, Field(ge=1, le=10**15)] | None = None
    """Size of the device's memory."""
    memory_gb_per_s: Rate | None = None
    """Bandwidth of the device's memory, GB/s."""
    l2_bytes: Annotated[int, Field(ge=1, le=10**12)] | None = None
    """Size of the cache that all multiprocessors share."""
    nvlink_gb_per_s: Share | None = None
    """Bandwidth to other devices in one direction, GB/s; 0: they are reached by PCIe."""
    pcie_gb_per_s: Rate | None = None
    """Bandwidth to the host in one direction, GB/s."""
    host_cores: Annotated[float, Field(ge=0.01, le=10_000, allow_inf_nan=False)] | None = None
    """Cores of the host for each device; a device's loop that has less than one takes longer."""
    host_speed: Annotated[float, Field(ge=0.001, le=1000, allow_inf_nan=False)] | None = None
    """Speed of one host thread relative to the profile's host."""
    price_per_hour: Annotated[float, Field(ge=0, le=MOST, allow_inf_nan=False)] | None = None
    """Price of one device with its share of the host, USD for an hour."""

    @validator(mode="after")
    def _whole(self) -> Self:
        if self.base is None:
            for key in _NEEDED:
                if getattr(self, key) is None:
                    raise refused("nothing", "its value, or a base from the catalogue for all that is not given", key)
        return self

    @model_serializer(mode="wrap")
    def _short(self, whole: SerializerFunctionWrapHandler) -> Any:
        given = {key: value for key, value in whole(self).items() if value is not None}
        return self.base if list(given) == ["base"] else given

    def device(self) -> Device:
        """The device that is meant."""
        given = {key: getattr(self, key) for key in type(self).model_fields if key != "base"}
        given = {key: value for key, value in given.items() if value is not None}
        if self.base is None:
            return Device(**{**_OWN, **given})
        base = CATALOGUE[self.base]
        if not given:
            return base
        cut = base.cut(self.sms or base.sms, self.clock_mhz)
        changed = ", ".join(f"{key} {value}" for key, value in given.items() if key in _TOLD)
        name = f"{base.name} ({changed})" if changed else base.name
        title = f"{base.title} ({changed})" if changed else base.title
        given |= {key: {**getattr(cut, key), **given[key]} for key in _RATES if key in given}
        return cut.model_copy(update={"name": name, "title": title} | given)


# Of a device of one's own nothing may be known of the cache, the host and the price.
_OWN: Mapping[str, Any] = {
    "name": "custom", "title": "custom", "family": "unknown", "l2_bytes": 50 << 20, "nvlink_gb_per_s": 0.0,
    "host_cores": 8.0, "host_speed": 1.0, "source": "the scenario",
}  # fmt: skip
_NEEDED = (
    "sms", "clock_mhz", "matrix_tflops", "vector_tflops", "memory_bytes", "memory_gb_per_s", "pcie_gb_per_s",
)  # fmt: skip
_RATES = ("matrix_tflops", "vector_tflops")  # by type: a type that is not given keeps the base's
_TOLD = ("sms", "clock_mhz", "memory_gb_per_s", "memory_bytes", "host_cores", "host_speed")


def _named(value: object) -> object:
    return {"base": value} if isinstance(value, str) else value


def _or_name(schema: dict[str, Any]) -> None:
    mapping = next(option for option in schema.pop("anyOf") if option.get("type") != "null")
    schema["anyOf"] = [{"type": "string", "enum": list(CATALOGUE)}, mapping, {"type": "null"}]


def _absent(value: object) -> bool:
    return value is None


def _single(value: object) -> bool:
    return value == 1


# Keys of scenarios; a result says nothing of them where they are not there.
HardwareKey = Annotated[Hardware | None, BeforeValidator(_named), Field(json_schema_extra=_or_name, exclude_if=_absent)]
TensorParallel = Annotated[int, Field(ge=1, le=64, exclude_if=_single)]
