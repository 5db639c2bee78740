"""The micro-batch, checkpointing and schedule with which a wanted global batch is trained fastest on a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from batchsim.batching.accumulation import divisors
from batchsim.errors import InputError
from batchsim.memory import library_for, peak_bytes
from batchsim.result import Run

if TYPE_CHECKING:
    from batchsim.training_profile import TrainingProfile
    from batchsim.training_scenario import TrainingScenario

Simulate = Callable[["TrainingScenario"], Run]
Tell = Callable[[float], None]
Again = Callable[[Any, Any], Run]

STEPS = 5  # optimiser steps of one trial; they differ by the host's jitter only
CHECKPOINTING = ("none", "full")
ALIKE = 0.002  # step times so close are told apart by the memory that they take


@dataclass(frozen=True, slots=True)
class Setting:
    """What is chosen."""

    schedule: str
    micro_batch: int
    accumulation_steps: int
    checkpointing: str


@dataclass(frozen=True, slots=True)
class Trial:
    """One setting: what it takes of the device, and where that is there its time. `fits`: it is."""

    setting: Setting
    peak_bytes: int
    fits: bool
    step_ms: float | None = None
    tokens_per_s: float | None = None
    device_busy_fraction: float | None = None


@dataclass(frozen=True, slots=True)
class Tuning:
    """What was found: the fastest setting that fits, the setting of the file, and all that were looked at.

    `interval_90_ms` is the 90% interval of the best's step, where it was asked for: see `batchsim.intervals`.
    """

    best: Trial
    asked: Trial | None
    trials: tuple[Trial, ...]
    room_bytes: int
    simulations: int
    interval_90_ms: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """As `batchsim tune --json` prints it."""
        return asdict(self)


def tune(
    scenario: TrainingScenario, simulate: Simulate, profile: TrainingProfile, *, progress: Tell | None = None,
    again: Again | None = None,
) -> Tuning:  # fmt: skip
    """Simulate every micro-batch that divides the global batch and fits the profile's device, with and without
    checkpointing, under each schedule of the scenario. With `again`, which simulates at other costs, the fastest one's
    step has an interval.

    Raises:
        InputError: without a file: not even a micro-batch of one with checkpointing fits.
    """
    library = library_for(str(profile.provenance.get("device")))
    room_bytes = profile.device_memory_bytes
    asked = (scenario.micro_batch, scenario.checkpointing)
    trials: list[Trial] = []
    wanted = [(size, kept) for kept in CHECKPOINTING for size in divisors(scenario.global_batch)]
    simulations = 0
    for done, (size, kept) in enumerate(wanted):
        update = {"micro_batch": size, "checkpointing": kept, "steps": min(scenario.steps, STEPS), "replications": 1}
        candidate = scenario.model_copy(update=update)
        peak = peak_bytes(candidate, room_bytes, library)
        settings = [Setting(name, size, candidate.accumulation_steps, kept) for name in scenario.schedules]
        if peak > room_bytes:
            trials += [Trial(setting, peak, fits=False) for setting in settings]
            continue
        found = simulate(candidate).results
        simulations += 1
        trials += [
            Trial(
                setting, peak, True, found[setting.schedule].step_ms["mean"],
                found[setting.schedule].throughput_tokens_per_s, found[setting.schedule].device_busy_fraction,
            )
            for setting in settings
        ]  # fmt: skip
        if progress is not None:
            progress((done + 1) / len(wanted))
    fitting = [trial for trial in trials if trial.fits and trial.step_ms is not None]
    if not fitting:
        least = min(trial.peak_bytes for trial in trials)
        found_text = f"at least {least / 1e9:,.1f} GB, with checkpointing and a micro-batch of 1"
        raise InputError(None, "model", found_text, f"what fits {room_bytes / 1e9:,.1f} GB of the device")
    fastest = min(trial.step_ms for trial in fitting if trial.step_ms is not None)
    close = [trial for trial in fitting if trial.step_ms is not None and trial.step_ms <= fastest * (1 + ALIKE)]
    best = min(close, key=lambda trial: (trial.peak_bytes, trial.step_ms))
    same = [each for each in trials if (each.setting.micro_batch, each.setting.checkpointing) == asked]
    interval_ms = None if again is None else _interval_ms(scenario, best.setting, profile, simulate, again)
    return Tuning(best, same[0] if same else None, tuple(trials), room_bytes, simulations, interval_ms)


def _interval_ms(
    scenario: TrainingScenario, best: Setting, profile: TrainingProfile, simulate: Simulate, again: Again
) -> tuple[float, float]:
    from batchsim.intervals import SWEEP_DRAWS, with_intervals

    update = {
        "micro_batch": best.micro_batch, "checkpointing": best.checkpointing, "schedules": (best.schedule,),
        "steps": min(scenario.steps, STEPS), "replications": 1,
    }  # fmt: skip
    chosen = scenario.model_copy(update=update)
    run = with_intervals(simulate(chosen), chosen, profile, again, draws=SWEEP_DRAWS)
    return run.results[best.schedule].interval_90["step_ms.mean"]
