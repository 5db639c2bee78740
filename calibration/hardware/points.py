"""Lists of what is executed on other hardware: configurations of device and host, and the workloads of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from batchsim.errors import InputError, nearest, one_of, shown
from batchsim.scenario import Scenario
from batchsim.workload_scenario import FixedWorkload
from batchsim.yaml_loader import load as load_yaml
from calibration.points import PROFILES

_KEYS = ("name", "hardware", "neighbours", "replicas", "points")


@dataclass(frozen=True, slots=True)
class Configuration:
    """One device and host, on which `scenarios` (by name) are executed in one process.

    The hardware that they all name says how many of the device's multiprocessors and, where it gives `host_cores`, on
    how many of the host's cores. So many `neighbours` keep the same cores busy meanwhile. With several `replicas` each
    has a device of its own, and all of them share those cores.
    """

    name: str
    scenarios: Mapping[str, Scenario]
    neighbours: int = 0

    @property
    def replicas(self) -> int:
        return next(iter(self.scenarios.values())).replicas

    @property
    def cores(self) -> int | None:
        """Cores of the host to run on; None: all that there are."""
        hardware = next(iter(self.scenarios.values())).hardware
        if hardware is None or hardware.host_cores is None:
            return None
        return max(1, round(hardware.host_cores * self.replicas))

    @property
    def crowded(self) -> bool:
        """Whether a loop shares its core: then it leaves it to others while it waits for its device."""
        return self.cores is not None and self.cores < self.replicas + self.neighbours


def read(path: Path) -> dict[str, Configuration]:
    """The configurations of a list by name, in the file's order.

    Raises:
        InputError: what is wrong with the file.
    """
    document = load_yaml(path).data
    found: dict[str, Configuration] = {}
    for index, entry in enumerate(document["configurations"]):
        for key in entry:
            if key not in _KEYS:
                wanted = f"{one_of(_KEYS)}{f'; perhaps {close}' if (close := nearest(key, _KEYS)) else ''}"
                raise InputError(str(path), f"configurations.{index}", shown(key), wanted)
        name, workloads = entry["name"], document["workloads"][entry["points"]]
        fixed = {key: entry[key] for key in ("hardware", "replicas") if key in entry}
        scenarios = {}
        for point in workloads:
            try:
                scenario = _scenario(name, {**document["defaults"], **point, **fixed})
            except ValidationError as error:
                problem = error.errors()[0]
                key = ".".join(map(str, (f"configurations.{index}", *problem["loc"])))
                raise InputError(str(path), key, shown(problem["input"]), problem["msg"]) from None
            scenarios[scenario.name] = scenario
        found[name] = Configuration(name, scenarios, entry.get("neighbours", 0))
    return found


def _scenario(configuration: str, point: dict[str, Any]) -> Scenario:
    batch, model = point.pop("batch"), point["model"]
    lengths = {"input_len": point.pop("input_len"), "output_len": point.pop("output_len")}
    profile = point.pop("profile", None) or PROFILES[model]
    name = f"{configuration}-{model.split('-')[-1]}-b{batch}-i{lengths['input_len']}-o{lengths['output_len']}"
    name += "" if point.get("cuda_graphs", True) else "-nograph"
    prompts = batch * point.get("replicas", 1)
    document = {
        "kind": "serving",
        "name": name,
        "profile": profile,
        "workload": FixedWorkload(kind="fixed", num_prompts=prompts, **lengths),
        "max_num_seqs": batch,
        **point,
    }
    return Scenario.model_validate(document)
