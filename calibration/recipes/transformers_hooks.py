"""Timers and annotations around the phases of transformers' continuous batching, and where its steps end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Steps:
    """What the hooks note of one generation, in steps of the loop; times in nanoseconds of the host's clock.

    `events` are pairs of CUDA events around the launches of each step.
    """

    ends: list[int] = field(default_factory=list)
    phases: dict[str, list[int]] = field(default_factory=dict)
    events: list[tuple[Any, Any]] = field(default_factory=list)


def hook(manager: Any, steps: Steps, profiler: Any = None, traced: range = range(0)) -> None:
    """Note in `steps` what the manager's loop does, once it has been started.

    A `profiler` runs during the steps `traced`; its trace has the phases as annotations.
    """
    import torch

    annotation = None if profiler is None else torch.profiler.record_function
    create, body = manager._create_batch_processor, _phase("cb.step", manager._generation_loop_body, steps, annotation)

    def created() -> Any:
        processor = create()
        runner, stream = processor.model_runner, processor.inputs_and_outputs.compute_stream
        if stream is not None:
            runner.compute_batch = _between_events(runner.compute_batch, steps, stream, torch.cuda.Event)
        _hook_phases(processor, steps, annotation)
        return processor

    def stepped(processor: Any, bootstrapping: bool) -> bool:
        before = manager.current_batch
        # In the loop's own thread: the profiler sees the operations of the thread that starts it.
        if profiler is not None and before == traced.start:
            profiler.start()
        goes_on: bool = body(processor, bootstrapping)
        if manager.current_batch > before:
            steps.ends.append(time.perf_counter_ns())
            if profiler is not None and manager.current_batch == traced.stop:
                profiler.stop()
        return goes_on

    manager._create_batch_processor = created
    manager._generation_loop_body = stepped


def _hook_phases(processor: Any, steps: Steps, annotation: Any) -> None:
    io, runner = processor.inputs_and_outputs, processor.model_runner
    for owner, method, name in (
        (processor.scheduler, "schedule_batch", "cb.prepare/schedule"),
        (io, "prepare_batch_tensors", "cb.prepare/build_inputs"),
        (processor, "prepare_next_batch", "cb.prepare"),
        (io, "get_model_kwargs", "cb.step/h2d_enqueue"),
        (runner, "compute_batch", "cb.step/launch"),
        (io, "retrieve_device_outputs", "cb.step/retrieve"),
        (io, "prepare_batch_update", "cb.update/wait_tokens"),
        (processor, "update_batch", "cb.update"),
    ):
        setattr(owner, method, _phase(name, getattr(owner, method), steps, annotation))


def _phase(name: str, function: Callable[..., Any], steps: Steps, annotation: Any) -> Callable[..., Any]:
    # The whole step is known from its ends; the loop's body also waits for requests that do not come.
    spent = [] if name == "cb.step" else steps.phases.setdefault(name, [])

    def timed(*arguments: Any, **options: Any) -> Any:
        begin = time.perf_counter_ns()
        try:
            return function(*arguments, **options)
        finally:
            spent.append(time.perf_counter_ns() - begin)

    def annotated(*arguments: Any, **options: Any) -> Any:
        with annotation(name):
            return timed(*arguments, **options)

    return timed if annotation is None else annotated


def _between_events(compute: Callable[..., Any], steps: Steps, stream: Any, event: Any) -> Callable[..., Any]:
    def computed(*arguments: Any, **options: Any) -> None:
        pair = event(enable_timing=True), event(enable_timing=True)
        pair[0].record(stream)
        compute(*arguments, **options)
        pair[1].record(stream)
        steps.events.append(pair)

    return computed
