"""How the answer to `batchsim whatif` is put: its headline, labels, and how its numbers came about."""

from __future__ import annotations

from collections.abc import Iterator

from batchsim.learned import LearnedProfile
from batchsim.whatif.answer import NOTHING, Answer, Prediction
from batchsim.whatif.replay import ADDED
from batchsim.whatif.traced import traced_ms

NO_PHASE = "host"
BY_TURNS = "host and device by turns"

DEFINITIONS = {
    "step": "from one step's start to the next one's, in the steady state and without a profiler; the median",
    "90% interval": "holds the step in 9 of 10 cases: 5th to 95th percentile over all that the trace leaves open",
    "gain": "steps a second over those of the loop as it is, which is marked",
    "device busy": "share of a step in which kernels or graphs are under way",
    "host": "the host's own work in a step, waits left out",
    "bound by": "which of the two is hardly ever idle; by turns: each waits for the other",
}


def headline(answer: Answer) -> str:
    """What overlapping gives, or gave, in a sentence."""
    now = answer.schedules[answer.as_is]
    other_name = "sync" if answer.as_is == "async" else "async"
    other = answer.schedules.get(other_name)
    if other is None:
        return f"As it is ({answer.as_is}), a step takes {now.step_ms:.4g} ms."
    low, high = other.step_ms_interval
    step = f"{other.step_ms:.4g} ms a step ({low:.4g} to {high:.4g})"
    gain = other.throughput_gain
    if answer.as_is == "async":
        in_place = f"in place of {now.step_ms:.4g} ms, {gain:+z.1%} throughput"
        return f"The loop is asynchronous already; sync would take {step} {in_place}."
    change = f"{now.step_ms:.4g} \N{RIGHTWARDS ARROW} {step}"
    if abs(gain) <= NOTHING:
        return f"Async gives next to nothing: {change}."
    low, high = other.throughput_gain_interval
    verdict = "is faster" if gain > 0 else "loses"
    return f"Async {'probably ' if low < 0 < high else ''}{verdict}: {change}, {gain:+z.1%} throughput."


def in_order(answer: Answer) -> dict[str, Prediction]:
    """All predictions, the loop as it is first."""
    return {answer.as_is: answer.schedules[answer.as_is]} | answer.schedules


def gains(found: Prediction) -> int:
    """1 for a gain, -1 for a loss, 0 for neither."""
    return 0 if abs(found.throughput_gain) <= NOTHING else 1 if found.throughput_gain > 0 else -1


def ms(value: float) -> str:
    """Milliseconds to the microsecond, or to four or five digits: `0.855`, `8.527`, `10.74`, `312.5`."""
    return f"{value:,.{3 if value < 10 else 2 if value < 100 else 1 if value < 1000 else 0}f}"


def phase_label(phase: str) -> str:
    """A phase as it is shown."""
    return {NO_PHASE: "outside phases", ADDED: "added by the schedule", "feedback": "feeds results back"}.get(
        phase, phase
    )


def how(answer: Answer) -> Iterator[tuple[str, str]]:
    """How the numbers came about: what, and a sentence or two on it."""
    profile, names = answer.profile, list(answer.schedules)
    kept = f"; {len(profile.steps)} of them are replayed" if len(profile.steps) < profile.steps_in_trace else ""
    yield "steps", f"{profile.steps_in_trace} in the trace, found by {profile.found_by}{kept}."
    error = (
        f"At its traced times, the replay is {profile.replay_error:+.1%} off the {traced_ms(profile):.4g} ms of a step"
    )
    yield "replay", f"{error} in the trace: so well were its dependences understood."
    yield "profiler", _profiler(answer)
    if profile.phases_ms:
        total = sum(profile.phases_ms.values())
        named = ", ".join(f"{phase_label(phase)} {each:.3g}" for phase, each in profile.phases_ms.items())
        yield "host timers", f"Untraced times of phases replace the traced ones, {total:.3g} ms a step in all: {named}."
    yield "interval", _INTERVAL
    yield ("sync", _SYNC) if answer.as_is == "async" else ("async", _ASYNC)
    if any("graphs" in name for name in names):
        yield "graphs", _GRAPHS
    if any("host_x" in name for name in names):
        yield "host x0.5, x2", "All of the host's own work, launches included, takes twice or half as long."
    for schedule, reason in answer.refused.items():
        yield f"no {schedule}", f"{reason}."


_INTERVAL = (
    "The trace leaves open the host's true speed, the cost of each event that the profiler recorded, the gaps "
    "that tracing makes in graphs, the device's clocks and contexts, and what a schedule adds. Each was drawn "
    "from what other traces showed, and every draw replayed; what no draw covers is added."
)
_ASYNC = (
    "Inputs are prepared in pinned memory and copied on a stream of their own, small ones in one copy; results "
    "are copied out on another and read one step later; what the next step needs of them is carried over on the "
    "device. What the host reads midway, to decide what to launch, stays where it is."
)
_SYNC = "The host waits for the results of each step before it prepares the next; all else stays as it is."
_GRAPHS = (
    "With graphs, the longest run of launches is captured in one; without, a graph's nodes are launched one by "
    "one, at what a framework's launch costs the host."
)


def _profiler(answer: Answer) -> str:
    traced, steady = traced_ms(answer.profile), answer.steady_step_ms
    if steady is None:
        return (
            f"A traced step took {traced:.4g} ms. What it takes without a profiler was not given (--steady-step-ms): "
            "the profiler's share was estimated from the number of events, which makes the intervals wider."
        )
    if traced <= steady:
        return (
            f"A traced step took {traced:.4g} ms, no longer than the {steady:.4g} ms that it takes without a profiler."
        )
    return (
        f"A traced step took {traced:.4g} ms, {traced - steady:.3g} ms more than without a profiler ({steady:.4g} ms). "
        "So much was taken out: from the host's work by the events recorded in it, and from graphs by their nodes."
    )


def found_in(profile: LearnedProfile) -> str:
    """Where the profile is from, in a line."""
    return f"{profile.steps_in_trace} steps found by {profile.found_by}, on {profile.device}"
