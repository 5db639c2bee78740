"""`batchsim learn` and `batchsim whatif`: what a profiler trace of somebody's loop tells."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchsim.command import Json, outcome, print_json, progress_bar
from batchsim.errors import InputError, shown

if TYPE_CHECKING:
    from batchsim.command import Tell
    from batchsim.learned import LearnedProfile
    from batchsim.whatif import Answer

# Fractions of a progress bar: a large trace is mostly read.
_READ, _LEARNED = 0.7, 0.8
_MAX_MS = 1e7  # Nearly three hours.
_MIN_MS = 1e-4
_CONFLICT = 0.5  # A replay that misses the untraced step by this much is of another loop.
# A profiler makes a step so many times as long at most; a shared host without one may be slower so many times.
_FASTEST, _SLOWEST = 50, 5

TraceFile = Annotated[
    Path,
    typer.Argument(metavar="TRACE", help="A trace by torch.profiler, or by calibration.record.", show_default=False),
]
TraceOrProfile = Annotated[
    Path, typer.Argument(metavar="TRACE|PROFILE", help="A trace, or what `learn` made of one.", show_default=False)
]
SteadyStep = Annotated[
    float | None, typer.Option("--steady-step-ms", metavar="MS", help="The loop's step time without a profiler.")
]
HostPhases = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Untraced host times: JSON of annotations' names and their ms a step."),
]


def register(app: typer.Typer) -> None:
    """Give `app` the commands."""
    app.command()(learn)
    app.command()(whatif)


def learn(
    trace: TraceFile,
    out: Annotated[Path, typer.Option(metavar="PROFILE", help="The profile to write, JSON.", show_default=False)],
    steady_step_ms: SteadyStep = None,
    host_phases: HostPhases = None,
    as_json: Json = False,
) -> None:
    """Learn a profile of any loop from a profiler trace of some of its steps."""
    with outcome():
        _check_step(steady_step_ms)
        _check_file("--out", out, trace)
        with progress_bar(f"learning {trace.name}") as progress:
            profile = _learned(trace, steady_step_ms, host_phases, progress)
        from batchsim.files import write_text
        from batchsim.report.learned import print_learned, summary

        _check_traced(profile, "--steady-step-ms" if steady_step_ms is not None else str(trace))

        if as_json:
            print_json(summary(profile))
        else:
            from rich.console import Console

            print_learned(Console(), profile)
        write_text(out, profile.model_dump_json(indent=1) + "\n")
        typer.echo(f"wrote {out}", err=True)


def whatif(
    file: TraceOrProfile,
    steady_step_ms: SteadyStep = None,
    host_phases: HostPhases = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report for a browser.")] = None,
    trace_out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the predicted timelines as a Chrome trace.")
    ] = None,
    trace_schedules: Annotated[
        str, typer.Option(metavar="NAMES", help="Those of --trace-out; `learn` reads a trace of one.")
    ] = "sync,async",
    as_json: Json = False,
) -> None:
    """Predict what async, graphs or another host would give the loop of a trace, with a reason and an interval."""
    with outcome():
        _check_step(steady_step_ms)
        _check_file("--html", html, file)
        _check_file("--trace-out", trace_out, file)
        if trace_out is not None and html is not None and trace_out.resolve() == html.resolve():
            raise InputError("--trace-out", "", f"the file {trace_out} of --html", "another file")
        names = [name.strip() for name in trace_schedules.split(",")]
        with progress_bar(f"learning {file.name}") as progress:
            profile = _learned_or_loaded(file, steady_step_ms, host_phases, progress)
            answer = _answer(profile, steady_step_ms, progress)
        _check_conflict(answer, "--steady-step-ms" if steady_step_ms is not None else str(file))
        _check_names(names, answer)
        if as_json:
            print_json(answer.to_json())
        else:
            from rich.console import Console

            from batchsim.report.whatif_terminal import print_whatif

            print_whatif(Console(), answer)
        if html is not None:
            from batchsim.report.whatif import write_whatif

            write_whatif(html, answer)
            typer.echo(f"wrote {html}", err=True)
        if trace_out is not None:
            from batchsim.whatif.timeline import write_predicted

            write_predicted(trace_out, answer, names)
            typer.echo(f"wrote {trace_out} (open in https://ui.perfetto.dev)", err=True)


def _check_step(steady_step_ms: float | None) -> None:
    # Of what is no number every comparison fails.
    if steady_step_ms is not None and not _MIN_MS <= steady_step_ms <= _MAX_MS:
        raise InputError("--steady-step-ms", "", shown(steady_step_ms), f"milliseconds from {_MIN_MS:g} to {_MAX_MS:g}")


def _check_file(option: str, path: Path | None, read: Path) -> None:
    if path is not None and path.is_dir():
        raise InputError(option, "", f"the folder {path}", "a file")
    if path is not None and path.exists() and read.exists() and path.samefile(read):
        raise InputError(option, "", f"the file {path} that is read", "another file")


def _check_traced(profile: LearnedProfile, place: str) -> None:
    from batchsim.whatif.traced import traced_ms

    traced, steady = traced_ms(profile), profile.steady_step_ms
    if steady is not None and not traced / _FASTEST <= steady <= traced * _SLOWEST:
        wanted = f"the step of the loop that was traced, whose steps took {traced:.4g} ms with the profiler"
        raise InputError(place, "", f"a step of {steady:.4g} ms", wanted)


def _check_conflict(answer: Answer, place: str) -> None:
    if answer.steady_step_ms is not None and abs(answer.conflict) > _CONFLICT:
        nearest = answer.steady_step_ms * (1 + answer.conflict)
        found = (
            f"an untraced step of {answer.steady_step_ms:g} ms where the traced operations make one of {nearest:.4g} ms"
        )
        raise InputError(place, "", found, "the step time of the loop that was traced, in milliseconds")


def _check_names(names: list[str], answer: Answer) -> None:
    from batchsim.refusal import choice

    for name in names:
        if name not in answer.schedules:
            raise InputError("--trace-schedules", "", shown(name), choice(name, list(answer.schedules)))


def _answer(profile: LearnedProfile, steady_step_ms: float | None, progress: Tell | None) -> Answer:
    from batchsim.whatif import whatif as predict

    if progress is None:
        return predict(profile, steady_step_ms)

    def tell(fraction: float) -> None:
        progress(_LEARNED + (1 - _LEARNED) * fraction, "predicting")

    return predict(profile, steady_step_ms, tell)


def _learned_or_loaded(
    file: Path, steady_step_ms: float | None, host_phases: Path | None, progress: Tell | None
) -> LearnedProfile:
    if not _is_profile(file):
        return _learned(file, steady_step_ms, host_phases, progress)
    from batchsim.learned import load_learned

    profile = load_learned(file)
    _steady(str(file), "steady_step_ms", profile.steady_step_ms)
    if steady_step_ms is not None:
        profile = profile.model_copy(update={"steady_step_ms": steady_step_ms})
    _check_phases(str(file), profile.phases_ms, profile)
    if host_phases is None:
        return profile
    from batchsim.whatif.timers import by_name, known_phases

    recorded = profile.provenance.get("phases_within")
    names = (
        {key: value for key, value in recorded.items() if isinstance(value, str)} if isinstance(recorded, dict) else {}
    )
    parents = by_name(known_phases(profile, names)) | names
    return _with_timers(profile, str(host_phases), _timers(host_phases), parents)


def _is_profile(file: Path) -> bool:
    """Whether the file is a learned profile; whatever cannot be told is left to the reader of traces to refuse."""
    from calibration.json_stream import JsonStream

    if not file.is_file():
        return False
    try:
        with file.open(encoding="utf-8-sig") as text:
            stream = JsonStream(str(file), iter(lambda: text.read(1 << 16), ""), wanted="", whole="")
            if stream.peek() != "{":
                return False
            for key in stream.members():
                if key in ("kind", "traceEvents"):
                    return key == "kind" and stream.value() == "learned"
                stream.skip(0)
    except (InputError, OSError, UnicodeDecodeError):
        pass
    return False


def _learned(
    file: Path, steady_step_ms: float | None, host_phases: Path | None, progress: Tell | None
) -> LearnedProfile:
    """The profile of a trace, with what is known of its untraced times."""
    timers = None if host_phases is None else _timers(host_phases)
    from calibration.kineto import read_trace
    from calibration.learn import learn as learned
    from calibration.phases_tree import parents_of

    def tell(done: int, size: int) -> None:
        if progress is not None:
            progress(_READ * done / max(size, 1))

    trace = read_trace(file, progress=tell)
    recorded = trace.extra.get("batchsim")
    about: dict[str, Any] = recorded if isinstance(recorded, dict) else {}
    known_ms = steady_step_ms or _steady(str(file), "batchsim.steady_step_ms", about.get("steady_step_ms"))
    profile = learned(trace, known_ms)
    parents = parents_of(trace)
    if progress is not None:
        progress(_LEARNED)
    if parents:
        profile = profile.model_copy(update={"provenance": profile.provenance | {"phases_within": parents}})
    if timers is not None:
        return _with_timers(profile, str(host_phases), timers, parents)
    if "phases_ms" not in about:
        return profile
    from batchsim.whatif.timers import checked, known_phases

    known = known_phases(profile, parents)
    own = checked(str(file), "batchsim.phases_ms", about["phases_ms"])
    return _timed(profile, str(file), {phase: ms for phase, ms in own.items() if phase in known}, parents)


def _steady(file: str, key: str, value: Any) -> float | None:
    """The untraced step time that a file tells, if any."""
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and _MIN_MS <= value <= _MAX_MS):
        raise InputError(file, key, shown(value), f"milliseconds from {_MIN_MS:g} to {_MAX_MS:g}")
    return float(value)


def _timers(file: Path) -> dict[str, float]:
    from batchsim.whatif.timers import read_timers

    return read_timers(file)


def _with_timers(
    profile: LearnedProfile, file: str, timers: dict[str, float], parents: dict[str, str]
) -> LearnedProfile:
    """The profile with a user's timers, all of which must be of its phases."""
    from batchsim.whatif.timers import check_known, known_phases

    check_known(file, timers, known_phases(profile, parents))
    return _timed(profile, file, timers, parents)


def _timed(profile: LearnedProfile, file: str, timers: dict[str, float], parents: dict[str, str]) -> LearnedProfile:
    from batchsim.whatif.timers import untraced

    phases_ms, notes = untraced(profile, timers, parents)
    _check_phases(file, phases_ms, profile)
    return profile.model_copy(update={"phases_ms": phases_ms, "notes": [*profile.notes, *notes]})


def _check_phases(file: str, phases_ms: dict[str, float], profile: LearnedProfile) -> None:
    from batchsim.whatif.timers import check_sum
    from batchsim.whatif.traced import traced_ms

    # A profiler makes steps longer: where the untraced one is not known, it is no longer than the traced.
    check_sum(file, phases_ms, profile.steady_step_ms or traced_ms(profile))
