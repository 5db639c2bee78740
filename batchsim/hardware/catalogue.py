"""The catalogue of devices: `catalogue.yaml`, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from types import MappingProxyType
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Device(BaseModel):
    """A device with its host. Rates are dense, at the boost clock; bandwidths of one direction.

    `host_cores` are the cores of the host for each device, `host_speed` the speed of one thread relative to the
    profiles' host, `price_per_hour` USD for one device. `reported` are the names under which CUDA knows it, `whole_sms`
    the multiprocessors of the device that this one is a part of.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: str
    title: str
    family: str
    reported: list[str] = []
    sms: PositiveInt
    clock_mhz: PositiveFloat
    matrix_tflops: dict[str, PositiveFloat]
    vector_tflops: dict[str, PositiveFloat]
    memory_bytes: PositiveInt
    memory_gb_per_s: PositiveFloat
    l2_bytes: PositiveInt
    nvlink_gb_per_s: NotNegative
    pcie_gb_per_s: PositiveFloat
    host_cores: PositiveFloat
    host_speed: PositiveFloat
    price_per_hour: NotNegative | None = None
    source: str
    whole_sms: PositiveInt | None = None

    def __hash__(self) -> int:
        return hash((self.name, self.sms, self.clock_mhz, self.memory_gb_per_s))

    @property
    def planned(self) -> int:
        """Multiprocessors for which libraries choose their kernels: of a part of a device those of the whole."""
        return self.whole_sms or self.sms

    def matrix_rate(self, dtype: str) -> float:
        """TFLOP/s of the matrix units; of a type that they lack, as of the other one of its width, or without them."""
        other = {"bf16": "fp16", "fp16": "bf16"}.get(dtype, "")
        return self.matrix_tflops.get(dtype) or self.matrix_tflops.get(other) or self.vector_rate()

    def cut(self, sms: int, clock_mhz: float | None = None) -> Device:
        """This device with so many multiprocessors, and at another clock: its rates change in proportion.

        With fewer it is a part of the whole, as a green context is.
        """
        factor = sms / self.sms * ((clock_mhz or self.clock_mhz) / self.clock_mhz)
        return self.model_copy(
            update={
                "sms": sms,
                "whole_sms": self.planned if sms < self.planned else None,
                "clock_mhz": clock_mhz or self.clock_mhz,
                "matrix_tflops": {dtype: rate * factor for dtype, rate in self.matrix_tflops.items()},
                "vector_tflops": {dtype: rate * factor for dtype, rate in self.vector_tflops.items()},
            }
        )

    def vector_rate(self) -> float:
        """TFLOP/s of the vector units in float32."""
        return self.vector_tflops.get("fp32") or min(self.vector_tflops.values())


def _read() -> Mapping[str, Device]:
    text = files("batchsim.hardware").joinpath("catalogue.yaml").read_text(encoding="utf-8")
    entries: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return MappingProxyType({name: Device(name=name, **entry) for name, entry in entries.items()})


CATALOGUE: Mapping[str, Device] = _read()


def device_of(provenance: Mapping[str, Any]) -> Device | None:
    """The catalogue's entry of the device that a profile was measured on, or None.

    Of a profile that was measured on some of a device's multiprocessors, that part of it.
    """
    reported = provenance.get("device")
    found = next((device for device in CATALOGUE.values() if reported in device.reported), None)
    sms = provenance.get("multiprocessors")
    if found is None or not isinstance(sms, int) or not 0 < sms < found.sms:
        return found
    return found.cut(sms)
