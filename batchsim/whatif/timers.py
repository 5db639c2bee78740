"""Untraced host times of phases, as timers around them give them, turned into what a replay needs.

A timer has in it what phases inside its phase take, and what the host waits for the device. The replay wants of each
phase the host's own work alone.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from batchsim.errors import InputError, shown
from batchsim.learned import Copy, LearnedProfile, Operation, Wait
from batchsim.refusal import choice
from batchsim.whatif.phases import host_ns

# A phase that waits for the device more than this share of its time has no host time of its own to be told.
WAITING = 0.1
# Where a file of other results may have the times; what is in `timed` is what transformers' recipe writes.
KEYS = ("phases_ms", "host_ms_p50", "host_ms_per_step")
FOLDED = ("timed", "batchsim")
WANTED = "a JSON object of phases and their milliseconds in a step without a profiler"
# Traced and untraced waits differ; a phase whose rest is less than this share of its timer is no host work to speak of.
LEAST = 0.2
# Medians of phases and of steps are of different steps, so that their sum may be a little longer than the step.
MOST = 1.05


def read_timers(file: Path) -> dict[str, float]:
    """Phases and their milliseconds a step, from a JSON object of them, or of `phases_ms` or `host_ms_per_step` in it.

    Raises:
        InputError: no such file, no such object, or a value that is no time.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(str(file), "", f"no readable file ({error.strerror})", WANTED) from None
    except json.JSONDecodeError as error:
        where = f"no JSON (line {error.lineno}, column {error.colno}: {error.msg})"
        raise InputError(str(file), "", where, WANTED) from None
    except RecursionError:
        raise InputError(str(file), "", "values nested too deep", WANTED) from None
    except ValueError:
        raise InputError(str(file), "", "bytes that are no text, or a number of thousands of digits", WANTED) from None
    path = ""
    for fold in FOLDED:
        if isinstance(value, dict) and isinstance(value.get(fold), dict):
            path, value = f"{fold}.", value[fold]
    for key in KEYS:
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            return checked(str(file), f"{path}{key}", value[key])
    return checked(str(file), path.rstrip("."), value)


def checked(file: str, key: str, value: Any) -> dict[str, float]:
    """`value` as phases and times.

    Raises:
        InputError: it is none, or some time is negative or no number.
    """
    if not isinstance(value, dict):
        raise InputError(file, key, shown(value), WANTED)
    for phase, ms in value.items():
        try:
            fine = isinstance(ms, int | float) and not isinstance(ms, bool) and math.isfinite(ms) and ms >= 0
        except OverflowError:
            fine = False
        if not fine:
            path = f"{key}.{phase}" if key else phase
            raise InputError(file, path, shown(ms), "milliseconds a step, 0 or more")
    return {phase: float(ms) for phase, ms in value.items()}


def known_phases(profile: LearnedProfile, parents: Mapping[str, str]) -> list[str]:
    """Names that a timer may have: those of phases, and of what stands around them but for the steps themselves."""
    around = (name for name in parents.values() if repr(name) not in profile.found_by)
    return list(dict.fromkeys([*profile.phases, *parents, *around]))


def check_known(file: str, timers: Iterable[str], known: list[str]) -> None:
    """Refuse a phase that is not `known`.

    Raises:
        InputError: with all phases that the trace has.
    """
    for phase in timers:
        if phase not in known:
            raise InputError(file, phase, "a phase that the trace does not have", choice(phase, known))


def check_sum(file: str, phases_ms: Mapping[str, float], step_ms: float) -> None:
    """Refuse host work that is longer than the step that it is part of.

    Raises:
        InputError: as it says.
    """
    total = sum(phases_ms.values())
    if total > MOST * step_ms:
        found = f"{total:.4g} ms of host work in a step of {step_ms:.4g} ms"
        raise InputError(file, "", found, "times of the same steady steps, such as medians over them")


def by_name(names: Iterable[str]) -> dict[str, str]:
    """Parents of phases that are named like paths, `a/b` within `a`, for a profile whose trace is not at hand."""
    every = set(names)
    parents: dict[str, str] = {}
    for name in every:
        parts = name.split("/")
        around = ("/".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
        if (outer := next((path for path in around if path in every), None)) is not None:
            parents[name] = outer
    return parents


def untraced(
    profile: LearnedProfile, timers: Mapping[str, float], parents: Mapping[str, str]
) -> tuple[dict[str, float], list[str]]:
    """Host work of each phase that `timers` tell of, milliseconds a step, and notes on what was left out.

    A timer's time, less that of the timers inside it and less what the trace waits in it, is shared out among its
    phase and those inside without a timer, as the trace has them.
    """
    own, waited = _traced_ms(profile)
    owners = {phase: _nearest_timer(phase, timers, parents) for phase in own}
    inside: defaultdict[str | None, float] = defaultdict(float)
    for name, ms in timers.items():
        outer = parents.get(name)
        around = None if outer is None else _nearest_timer(outer, timers, parents)
        if around not in (None, name):
            inside[around] += ms
    found: dict[str, float] = {}
    notes: list[str] = []
    for name, ms in timers.items():
        phases = [phase for phase, owner in owners.items() if owner == name]
        work, wait = sum(own[phase] for phase in phases), sum(waited[phase] for phase in phases)
        rest = ms - inside[name]
        if not work or (rest <= 0 and ms > 0):
            if phases and rest < 0:
                notes.append(f"the untraced time of {name} is left out, for phases inside it take longer")
        elif wait > WAITING * (work + wait) or rest - wait < LEAST * rest:
            notes.append(f"the untraced time of {name} is left out, for the device is waited for in it")
        else:
            found |= {phase: own[phase] / work * (rest - wait) for phase in phases}
    return found, notes


def _nearest_timer(phase: str, timers: Mapping[str, float], parents: Mapping[str, str]) -> str | None:
    """The phase itself or the next around it that has a timer."""
    seen: set[str] = set()
    at: str | None = phase
    while at is not None and at not in seen:
        if at in timers:
            return at
        seen.add(at)
        at = parents.get(at)
    return None


def _traced_ms(profile: LearnedProfile) -> tuple[dict[str, float], dict[str, float]]:
    """What the host works and what it waits in each phase of a traced step."""
    own = dict.fromkeys(profile.phases, 0.0)
    waited = dict.fromkeys(profile.phases, 0.0)
    for step in profile.steps:
        for operation in step.operations:
            own[operation.phase] += host_ns(operation) / len(profile.steps) / 1e6
            waited[operation.phase] += waited_ns(operation) / len(profile.steps) / 1e6
    return own, waited


def waited_ns(operation: Operation) -> int:
    """What the host waits in an operation, as traced."""
    if isinstance(operation, Wait):
        return operation.waited_ns
    return operation.device_ns if isinstance(operation, Copy) and operation.waits else 0
