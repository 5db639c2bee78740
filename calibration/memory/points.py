"""What is measured: points and edges from YAML files, as the programs that `batchsim.memory` predicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from batchsim.batching.continuous import kv_blocks
from batchsim.memory import services, serving, training
from batchsim.memory.overheads import Library
from batchsim.memory.services import Service
from batchsim.memory.serving import Serving
from batchsim.memory.tape import Tape
from batchsim.memory.training import Training
from batchsim.model import MODELS, SERVICES, TRAINED
from batchsim.yaml_loader import load

Program = Serving | Service | Training


@dataclass(frozen=True, slots=True)
class Point:
    """A program to be measured; at an edge, the batch is what is looked for, on a device with `capacity` bytes."""

    name: str
    program: Program
    capacity: int | None = None

    @property
    def batch(self) -> int:
        return batch_of(self.program)


def batch_of(program: Program) -> int:
    """The batch of a program: requests that run at once, requests of a batch, or sequences of a micro-batch."""
    match program:
        case Serving():
            return program.max_num_seqs
        case Service():
            return program.max_batch_size
        case Training():
            return program.micro_batch


def with_batch(program: Program, batch: int) -> Program:
    """The same program with another batch."""
    match program:
        case Serving():
            blocks = batch * kv_blocks(program.max_model_len, program.block_size)
            return replace(program, max_num_seqs=batch, num_kv_blocks=blocks)
        case Service():
            return replace(program, max_batch_size=batch)
        case Training():
            return replace(program, micro_batch=batch)


def tape_of(program: Program, library: Library) -> Tape:
    """The tape of a program on a device with `library`."""
    match program:
        case Serving():
            return serving.tape(replace(program, library=library))
        case Service():
            return services.tape(replace(program, library=library))
        case Training():
            return training.tape(replace(program, library=library))


def read(path: Path) -> list[Point]:
    """The points of a file, each under `serving`, `services` or `training`; one with `capacity_gb` is an edge.

    Names of points that are `new` begin so.
    """
    document: Mapping[str, Any] = load(path).data
    return [_point(kind, dict(entry)) for kind, entries in document.items() for entry in entries]


def _point(kind: str, entry: dict[str, Any]) -> Point:
    capacity = entry.pop("capacity_gb", None)
    label = ["new"] if entry.pop("new", False) else []
    name = "-".join(f"{value}" for value in (*label, kind, *entry.values()))
    name = name.replace("[", "").replace("]", "").replace(", ", "+")
    model = entry.pop("model")
    program: Program
    if kind == "serving":
        seqs, length = entry["max_num_seqs"], entry["max_model_len"]
        block = entry.get("block_size", 16)
        entry.setdefault("num_kv_blocks", seqs * kv_blocks(length, block))
        program = Serving(MODELS[model], **entry)
    elif kind == "services":
        program = Service(SERVICES[model], **entry | {"lengths": tuple(entry.get("lengths", (1,)))})
    else:
        program = Training(TRAINED[model], **entry)
    if capacity is not None:
        name += f"-in-{capacity}GB"
    return Point(name, program, None if capacity is None else round(capacity * 1e9))


def told(program: Program) -> dict[str, Any]:
    """A program as plain data."""
    return asdict(program) | {"shape": program.shape.name, "library": program.library.name}
