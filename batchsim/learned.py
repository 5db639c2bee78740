"""A profile learned from a profiler trace: the steps of somebody's loop, as operations of a host and of streams.

An operation takes its host time, in the order of the list; what it puts on a stream runs there in order. Times are as
traced, nanoseconds: what the profiler added is told by `events`, the number of events that it recorded meanwhile, and
is taken out by whoever replays them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from batchsim.profile import Measured, parsed
from batchsim.shipped import read_profile

# A day, and what a device holds; more is a damaged file.
Nanoseconds = Annotated[int, Field(ge=0, le=86_400 * 10**9)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Bytes = Annotated[int, Field(ge=0, le=2**50)]

Direction = Literal["h2d", "d2h", "d2d"]


class Work(Measured):
    """The host computes: interpreter, framework, and calls that put nothing on the device."""

    op: Literal["work"] = "work"
    phase: str
    ns: Nanoseconds
    events: Count


class Kernels(Measured):
    """Kernels launched one after the other on one stream, or one graph.

    `host_ns[i]` is from the start of launch i to the start of the next one, and of the last launch the call alone. A
    graph is one launch of `nodes` kernels; its device time has the gaps between its nodes in it, as traced.
    """

    op: Literal["kernels"] = "kernels"
    phase: str
    stream: Count
    host_ns: list[Nanoseconds] = Field(min_length=1)
    events: list[Count] = Field(min_length=1)
    device_ns: list[Nanoseconds] = Field(min_length=1)
    nodes: Annotated[int, Field(ge=1, le=10**5)] | None = None
    """Of a graph, its kernels and copies; None: launched kernel by kernel."""

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if not len(self.host_ns) == len(self.events) == len(self.device_ns):
            raise ValueError("host_ns, events and device_ns have one entry a launch")
        if self.nodes is not None and len(self.host_ns) != 1:
            raise ValueError("a graph is one launch")
        return self


class Copy(Measured):
    """A copy: `h2d`, `d2h`, or on the device `d2d` (a memset too). `waits`: the call returns when it is done."""

    op: Literal["copy"] = "copy"
    phase: str
    stream: Count
    direction: Direction
    bytes: Bytes
    pinned: bool
    waits: bool
    host_ns: Nanoseconds
    events: Count
    device_ns: Nanoseconds


class StreamWait(Measured):
    """`stream` waits for what was put on the stream `on` before."""

    op: Literal["stream_wait"] = "stream_wait"
    phase: str
    stream: Count
    on: Count
    host_ns: Nanoseconds
    events: Count


class Wait(Measured):
    """The host waits until operation `target` of the step `lag` steps before has ended on the device.

    `host_ns` is the call's own time, that of waking up included; `waited_ns` what it waited, as traced.
    """

    op: Literal["wait"] = "wait"
    phase: str
    lag: Count
    target: Count
    host_ns: Nanoseconds
    events: Count
    waited_ns: Nanoseconds


Operation = Annotated[Work | Kernels | Copy | StreamWait | Wait, Field(discriminator="op")]


class Step(Measured):
    """One traced step: its operations in the host's order, and how long it took, start to start, nanoseconds."""

    traced_ns: Annotated[int, Field(ge=1, le=86_400 * 10**9)]
    operations: list[Operation] = Field(min_length=1)

    @model_validator(mode="after")
    def _targets(self) -> Self:
        for i, operation in enumerate(self.operations):
            if isinstance(operation, Wait) and operation.lag == 0 and operation.target >= i:
                raise ValueError(f"operation {i} waits for operation {operation.target}, which comes later")
        return self


class TracedMlp(Measured):
    """A product (rows, hidden) @ (hidden, inner), an activation, and a product back to `hidden` columns.

    `gated_mlp`: the first product is two, of gate and of up, launched as one or one after the other. `count`: how many
    a step has, on average. Device time of one, nanoseconds: `ns` of all its kernels, `products_ns` of the products'
    alone, both with the gaps of a busy stream behind the kernels, as `Kernels.device_ns` has them.
    """

    kind: Literal["gated_mlp", "mlp"]
    rows: Annotated[int, Field(gt=0, lt=1 << 31)]
    hidden: Annotated[int, Field(gt=0, lt=1 << 31)]
    inner: Annotated[int, Field(gt=0, lt=1 << 31)]
    count: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    ns: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    products_ns: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class LearnedProfile(Measured):
    """What a trace tells about a loop. `steady_step_ms` is its step without a profiler, where that is known.

    `queued_gap_ns` is what a kernel's device time has in it for the gap before the next on a busy stream,
    `graph_gap_ns` the median gap between the nodes of a traced graph; `launch_ns` from a launch call's start to its
    kernel's on an idle device; `replay_error` how far a replay of the traced times is from the traced steps, signed.
    `phases_ms` are untraced host times of phases, without their waits.
    """

    schema_version: Literal[1] = 1
    kind: Literal["learned"] = "learned"
    source: str
    device: str
    found_by: str
    steps_in_trace: PositiveInt
    steady_step_ms: PositiveFloat | None = None
    phases_ms: dict[str, NonNegativeFloat] = Field({})
    launch_ns: Nanoseconds
    queued_gap_ns: Nanoseconds
    graph_gap_ns: Nanoseconds
    replay_error: float
    dense: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The share of the kernels' time in dense matrix products, which draw so much power that they lower the clocks."""
    chains: list[TracedMlp] = Field([])
    """MLPs whose shapes the trace tells, those with most time first."""
    attention: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The share of the kernels' time in attention, which takes longer as sequences grow."""
    notes: list[str] = Field([])
    provenance: dict[str, Any]
    steps: list[Step] = Field(min_length=1)

    @property
    def phases(self) -> tuple[str, ...]:
        """Host phases in the order in which they first occur."""
        return tuple(dict.fromkeys(operation.phase for step in self.steps for operation in step.operations))


def load_learned(file: Path) -> LearnedProfile:
    """Read a profile that `batchsim learn` wrote.

    Raises:
        InputError: it is not one.
    """
    text, source = read_profile(
        str(file), Path(), ".", what="learned profile", wanted="a file that `batchsim learn` wrote"
    )
    return parsed(LearnedProfile, text, source)
