"""Traces that say nothing certain about a loop are refused, each with a sentence on what is missing and how to record
it, and less certain ones are learned with a note."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from batchsim.cli import app
from batchsim.errors import InputError
from batchsim.learned import LearnedProfile
from calibration.kineto import read_trace
from calibration.learn import learn
from tests.kineto_traces import Event
from tests.learn_traces import MAIN, Step, Tracer, overlapped, run, sync

DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
HOST = ("cpu_op", "cuda_runtime", "user_annotation")
SHORT = Step(kernels=(60_000,) * 6)


def recorded(schedule: Any = sync, steps: int = 8, step: Step = SHORT, **how: Any) -> list[Event]:
    return run(schedule, step, steps, **how)[0].events


def without(*categories: str) -> list[Event]:
    return [event for event in recorded() if event["cat"] not in categories]


def irregular() -> list[Event]:
    """Launches without a period, and nothing around them."""
    tracer = Tracer()
    for number in range(40):
        tracer.launch(50_000, name=f"kernel_{number}")
        tracer.synchronize()
    return tracer.events


def two_devices() -> list[Event]:
    return [*recorded(), *[event for event in recorded(device=1) if event["cat"] in DEVICE]]


def stretched() -> list[Event]:
    """Each step ends after the next has begun."""
    return [{**event, "dur": event["dur"] * 1.5} if is_step(event) else event for event in recorded()]


def two_loops() -> list[Event]:
    """Two threads that each run steps at once."""
    other = Tracer(thread=MAIN + 1)
    other._correlation = 50_000
    for number in range(8):
        with other.around(f"ProfilerStep#{number}"):
            other.work(300_000)
            other.launch(10_000, stream=99)
    return [*recorded(before=0), *other.events]


def is_step(event: Event) -> bool:
    return str(event["name"]).startswith("ProfilerStep")


def written(events: list[Event]) -> str:
    return json.dumps({"schemaVersion": 1, "traceEvents": events})


# A file's content, what its refusal says is there, and what it says to do.
REFUSED: dict[str, tuple[Callable[[], str | bytes], str, str]] = {
    "truncated": (lambda: written(recorded())[:-5000], "ends in the middle", "record anew"),
    "truncated, zipped": (
        lambda: gzip.compress(written(recorded()).encode())[:-500],
        "a gzip file that ends in the middle",
        "record anew",
    ),
    "empty": (lambda: "", "an empty file", "export_chrome_trace"),
    "no trace": (lambda: '{"loss": [3.1, 2.9]}', "no traceEvents", "export_chrome_trace"),
    "text": (lambda: "step 1: 10.3 ms\n", "", "export_chrome_trace"),
    "no events": (lambda: written([]), "no events", "ProfilerActivity.CUDA"),
    "no device events": (lambda: written(without(*DEVICE)), "no kernels", "ProfilerActivity.CPU and CUDA"),
    "CPU only": (
        lambda: written(without(*DEVICE, "cuda_runtime")), "no kernels", "ProfilerActivity.CPU and CUDA",
    ),
    "no host events": (lambda: written(without(*HOST)), "no launch call of the host", "ProfilerActivity.CPU and CUDA"),
    "no launches": (
        lambda: written(without("cuda_runtime")), "no launch call of the host", "ProfilerActivity.CPU and CUDA",
    ),
    "no steps": (lambda: written(irregular()), "no steps", "inside an annotation"),
    "one step": (lambda: written(recorded(steps=1)), "no steps", "at least 4 steps"),
    "few steps": (
        lambda: written(recorded(steps=3, name=None, phases=False)), "no steps", "at least 4 steps",
    ),
    "several devices": (lambda: written(two_devices()), "activity on devices 0, 1", "CUDA_VISIBLE_DEVICES"),
    "overlapping steps": (lambda: written(stretched()), "steps that overlap", "one after the other"),
    "two loops at once": (lambda: written(two_loops()), "steps that overlap", "one loop of one thread"),
}  # fmt: skip


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        learn(read_trace(path))
    assert len(caught.value.problems) == 1
    return str(caught.value)


def saved(folder: Path, data: str | bytes, name: str = "trace.json") -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_what_is_missing_and_how_to_record_it(tmp_path: Path, case: str) -> None:
    make, found, wanted = REFUSED[case]
    path = saved(tmp_path, make())
    text = refusal(path)
    assert text.startswith(f"{path}: ") and "\n" not in text
    told, how = text.removeprefix(str(path)).split(", wanted ")
    assert found in told and wanted in how


@pytest.mark.parametrize("case", REFUSED)
def test_the_commands_say_the_same_and_write_nothing(tmp_path: Path, case: str) -> None:
    path = saved(tmp_path, REFUSED[case][0]())
    expected = refusal(path)
    out, page, timeline = (tmp_path / name for name in ("profile.json", "page.html", "timeline.json"))
    calls: list[list[str | Path]] = [
        ["learn", path, "--out", out],
        ["whatif", path, "--steady-step-ms", "2", "--html", page, "--trace-out", timeline],
        ["whatif", path, "--json"],
    ]
    for arguments in calls:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.strip() == expected
    assert list(tmp_path.iterdir()) == [path]


# What a trace lacks that has steps, and would have them wrong.


def learned(tmp_path: Path, events: list[Event]) -> LearnedProfile:
    return learn(read_trace(saved(tmp_path, written(events))))


def some(events: list[Event], lost: Callable[[Event], bool], one_in: int) -> list[Event]:
    """The events but for one in `one_in` of those that may be lost."""
    count, kept = 0, []
    for event in events:
        count += lost(event)
        if not (lost(event) and count % one_in == 0):
            kept.append(event)
    return kept


def is_kernel(event: Event) -> bool:
    return bool(event["cat"] == "kernel")


def is_launch(event: Event) -> bool:
    return bool(event["name"] == "cudaLaunchKernel")


def is_wait(event: Event) -> bool:
    return "Synchronize" in event["name"]


def moved(events: list[Event], us: float, which: Callable[[Event], bool]) -> list[Event]:
    return [{**event, "ts": event["ts"] + us} if which(event) else event for event in events]


def on_device(event: Event) -> bool:
    return event["cat"] in DEVICE


def numbered(events: list[Event], by: int) -> list[Event]:
    """Correlation ids taken modulo `by`."""
    return [
        {**event, "args": event["args"] | {"correlation": event["args"]["correlation"] % by}}
        if "correlation" in event["args"]
        else event
        for event in events
    ]


def waiting(longer: int = 0) -> list[Event]:
    """Steps whose results nobody copies: the host waits for the stream, and `longer`."""
    tracer = Tracer()
    for number in range(8):
        with tracer.around(f"ProfilerStep#{number}"):
            tracer.work(300_000)
            for _ in range(8):
                tracer.launch(100_000)
            with tracer.phase("results"):
                tracer.synchronize(longer=longer)
            tracer.work(200_000)
    return tracer.events


def growing(factor: float) -> list[Event]:
    tracer = Tracer()
    for number in range(10):
        with tracer.around(f"ProfilerStep#{number}"):
            tracer.work(300_000)
            tracer.launch(round(500_000 * factor ** (number >= 5)))
            tracer.synchronize()
    return tracer.events


def second_process(events: list[Event]) -> list[Event]:
    """Every other launch is another process's."""
    launches = [event for event in events if is_launch(event)][::2]
    return [{**event, "pid": 9} if event in launches else event for event in events]


INCONSISTENT: dict[str, tuple[Callable[[], list[Event]], str]] = {
    "kernels lost": (lambda: some(recorded(), is_kernel, 4), "calls of launches without what they put on the device"),
    "launches lost": (lambda: some(recorded(), is_launch, 4), "without the calls that launch them"),
    "all waits lost": (
        lambda: [event for event in waiting() if not is_wait(event)], "that ends as the device falls idle",
    ),
    "waits for what the trace lacks": (lambda: waiting(longer=500_000), "that end with nothing on the device"),
    "a device's clock that is late": (
        lambda: moved(recorded(), -5000, on_device), "begin before the calls that launch them",
    ),
    "a clock that jumps back": (
        lambda: moved(recorded(), -700, lambda event: on_device(event) and event["ts"] > recorded()[-1]["ts"] - 4000),
        "begin before the calls that launch them",
    ),
    "a trace twice": (
        lambda: [*recorded(), *moved(recorded(), 50_000, lambda _: True)], "that bear the correlation id of another",
    ),
    "ids that come again": (lambda: numbered(recorded(), 50), "that bear the correlation id of another"),
    "kernels twice": (
        lambda: [*recorded(), *filter(is_kernel, recorded())], "launches of one kernel that launched several",
    ),
    "two processes": (lambda: second_process(recorded()), "launches by 2 processes (4711, 9)"),
    "steps of two kinds": (lambda: growing(40), "steps of 0.8"),
}  # fmt: skip


@pytest.mark.parametrize("case", INCONSISTENT)
def test_a_trace_that_contradicts_itself_is_refused(tmp_path: Path, case: str) -> None:
    make, found = INCONSISTENT[case]
    text = refusal(saved(tmp_path, written(make())))
    assert "\n" not in text and found in text.split(", wanted ")[0]


DOUBTFUL: dict[str, tuple[Callable[[], list[Event]], str]] = {
    "a kernel lost": (lambda: some(recorded(), is_kernel, 40), "1 calls of launches without what they put on"),
    "a launch lost": (lambda: some(recorded(), is_launch, 40), "without the calls that launch them"),
    "a wait lost": (lambda: some(waiting(), is_wait, 5), "no call that waits for the device in 1 of"),
    "a step's annotation lost": (
        lambda: some(recorded(name="serve"), lambda event: bool(event["name"] == "serve"), 5),
        "launches between the steps in 1 of 6 places",
    ),
    "steps that grow": (lambda: growing(3), "steps of 0.8"),
}  # fmt: skip


@pytest.mark.parametrize("case", DOUBTFUL)
def test_a_trace_with_little_missing_is_learned_with_a_note(tmp_path: Path, case: str) -> None:
    make, found = DOUBTFUL[case]
    assert any(found in note for note in learned(tmp_path, make()).notes)


@pytest.mark.parametrize("schedule", [sync, overlapped])
def test_a_sound_trace_has_no_notes_of_doubt(tmp_path: Path, schedule: Any) -> None:
    for events in (recorded(schedule), recorded(schedule, step=Step(graph=True)), recorded(schedule, event_ns=1000)):
        assert not [note for note in learned(tmp_path, events).notes if note.startswith("the trace has")]


def test_numbers_that_no_step_has_are_refused(tmp_path: Path) -> None:
    events = recorded()
    for event in events:
        if event["cat"] == "gpu_memcpy":
            event["args"]["bytes"] = 1 << 62
    assert "bytes" in refusal(saved(tmp_path, written(events)))
