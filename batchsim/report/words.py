"""Results put into words: what happened, why, and what a person can do about it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from batchsim.operations import HOST_PHASES, Forward, Synchronize
from batchsim.result import Run, ScheduleResult, errors, figures, in_points


class Metric(NamedTuple):
    """A figure as it is shown: its key in `batchsim.result.figures`, its name, and its number format."""

    key: str
    label: str
    format: str


METRICS = (
    Metric("throughput_tokens_per_s", "tokens/s", ",.0f"),
    Metric("gain_over_sync", "gain over sync", "+.1%"),
    Metric("step_ms.mean", "step mean, ms", ",.3f"),
    Metric("step_ms.p50", "step p50, ms", ",.3f"),
    Metric("step_ms.p95", "step p95, ms", ",.3f"),
    Metric("step_ms.p99", "step p99, ms", ",.3f"),
    Metric("device_busy_fraction", "device busy", ".2%"),
    Metric("launch_gap_fraction", "launch gaps", ".1%"),
    Metric("host_busy_fraction", "host busy", ".1%"),
    Metric("total_s", "total, s", ",.3f"),
)

HOST_WORK = tuple(phase for phase in HOST_PHASES if phase != Synchronize.phase)

# Below, a gain is noise; above, host or device count as the bottleneck.
NEGLIGIBLE_GAIN = 0.005
HOST_BOUND = 0.95
DEVICE_BOUND = 0.99

_ALONE = "Preparing batches ahead can hide host time: compare with --schedules sync,async."


def stage_label(stage: str) -> str:
    """`device_copy_in` -> `copy in (device)`; host phases and forwards keep their names."""
    return f"{stage.removeprefix('device_')} (device)" if stage.startswith("device_") else stage


def error_text(key: str, error: float) -> str:
    """A signed error with its unit: `+1.2%` or `-0.3 pt`. A rounded zero has no minus sign."""
    return f"{_rounded(error, 1):+.1f} pt" if in_points(key) else f"{_rounded(error * 100, 1):+.1f}%"


def _rounded(value: float, digits: int) -> float:
    return round(value, digits) + 0.0


def shown(result: ScheduleResult) -> dict[str, float]:
    """The figures that are worth showing: all but the gain of sync over itself."""
    return {
        key: value for key, value in figures(result).items() if (key, result.schedule) != ("gain_over_sync", "sync")
    }


def idle_shares(result: ScheduleResult) -> dict[str, float]:
    """The share of the total time that the device idled for each stage, largest first."""
    total_ns = result.total_s * 1e9
    ordered = sorted(result.idle_ns.items(), key=lambda item: (-item[1], item[0]))
    return {stage: ns / total_ns for stage, ns in ordered if ns}


def host_work_ms(result: ScheduleResult) -> float:
    """Host time of a mean step in which the host does not wait for the device."""
    return result.step_ms["mean"] * result.host_busy_fraction


def headline(predicted: Run, measured: Run | None = None) -> str:
    """One sentence: what the alternatives to sync change; without sync, what each schedule reaches."""
    run = measured or predicted
    baseline = run.results.get("sync")
    others = [result for name, result in run.results.items() if name != "sync"]
    if baseline is None or not others:
        return " ".join(f"{r.schedule}: {r.throughput_tokens_per_s:,.0f} tokens/s." for r in run.results.values())
    verb = "is" if measured else "should be"
    parts = []
    for other in others:
        gain = _gain(baseline, other)
        if abs(gain) < NEGLIGIBLE_GAIN:
            verdict = f"{verb} as fast as sync"
        else:
            verdict = f"{verb} {abs(gain):.1%} {'faster' if gain > 0 else 'slower'} than sync"
        part = f"{other.schedule} {verdict}: {_tokens(baseline, other)}"
        if measured is not None and other.schedule in predicted.results and "sync" in predicted.results:
            part += f" (predicted {_gain(predicted.results['sync'], predicted.results[other.schedule]):+.1%})"
        parts.append(part)
    return ("Measured: " if measured else "") + "; ".join(parts) + "."


def causes(run: Run) -> list[str]:
    """Sentences that say where the device's time goes under each schedule, and what follows from it."""
    baseline = run.results.get("sync")
    sentences = []
    for result in run.results.values():
        sentence = _idle_sentence(result)
        if baseline is None or result is baseline:
            hint = f" {_ALONE}" if list(run.results) == ["sync"] and 1 - result.device_busy_fraction >= 0.01 else ""
            sentences.append(sentence + hint)
        else:
            sentences.append(f"{_comparison(baseline, result)} {sentence} {_next_step(result)}".strip())
    return sentences


def agreement(predicted: Run, measured: Run) -> str:
    """How far the prediction is from the execution, in one sentence a schedule."""
    sentences = []
    for name, result in measured.results.items():
        if name in predicted.results:
            error = errors(predicted.results[name], result)
            tokens = error_text("throughput_tokens_per_s", error["throughput_tokens_per_s"])
            busy = error_text("device_busy_fraction", error["device_busy_fraction"])
            sentences.append(f"{name}: tokens/s {tokens}, device busy {busy}")
    return "Prediction minus execution: " + "; ".join(sentences) + "."


def unique_warnings(runs: Iterable[Run]) -> list[str]:
    """The warnings of all results, each once, in order."""
    return list(dict.fromkeys(text for run in runs for result in run.results.values() for text in result.warnings))


def _gain(baseline: ScheduleResult, other: ScheduleResult) -> float:
    return other.throughput_tokens_per_s / baseline.throughput_tokens_per_s - 1


def _tokens(baseline: ScheduleResult, other: ScheduleResult) -> str:
    left, right = baseline.throughput_tokens_per_s, other.throughput_tokens_per_s
    return f"{left:,.0f} \N{RIGHTWARDS ARROW} {right:,.0f} tokens/s"


def _idle_sentence(result: ScheduleResult) -> str:
    shares = idle_shares(result)
    idle = 1 - result.device_busy_fraction
    if idle < 0.0005:
        sentence = f"{result.schedule} keeps the device busy {result.device_busy_fraction:.2%} of the time."
    else:
        largest = [(stage, share) for stage, share in list(shares.items())[:3] if share >= 0.0005]
        parts = [f"{share * 100:.1f} for {stage_label(stage)}" for stage, share in largest]
        rest = idle - sum(share for _, share in largest)
        if rest >= 0.0005 and largest:
            parts.append(f"{rest * 100:.1f} for the rest")
        detail = ": " + ", ".join(parts).replace(" for ", " points waiting for ", 1) if parts else ""
        sentence = f"{result.schedule} leaves the device idle {idle:.{1 if idle >= 0.01 else 2}%} of the time{detail}."
    gaps = result.launch_gap_fraction or 0.0
    if gaps >= 0.005:
        sentence += f" Another {gaps:.1%} pass inside its forwards, waiting for the next kernel launch."
    return sentence


def _comparison(baseline: ScheduleResult, other: ScheduleResult) -> str:
    name, gain = other.schedule, _gain(baseline, other)
    tokens = _tokens(baseline, other)
    hidden = other.device_busy_fraction - baseline.device_busy_fraction
    if gain >= NEGLIGIBLE_GAIN:
        if hidden >= 0.001:
            idle = 1 - baseline.device_busy_fraction
            return f"{name} hides {hidden * 100:.1f} of these {idle * 100:.1f} points: {tokens} ({gain:+.1%})."
        return f"{name} is faster: {tokens} ({gain:+.1%})."
    host_bound = other.host_busy_fraction >= HOST_BOUND
    work = f"{host_work_ms(other):,.2f} ms of host work a step against {host_work_ms(baseline):,.2f} ms"
    if gain > -NEGLIGIBLE_GAIN:
        reason = f"the host limits both ({work})" if host_bound else "there was little idle time to hide"
        return f"{name} changes little: {tokens} ({gain:+.1%}), since {reason}."
    if host_bound:
        reason = f"the host is the bottleneck, busy {other.host_busy_fraction:.1%} of the time, with {work}"
    else:
        reason = f"a step takes {other.step_ms['mean']:,.2f} ms against {baseline.step_ms['mean']:,.2f} ms"
    return f"{name} is slower: {tokens} ({gain:+.1%}): {reason}."


def _next_step(result: ScheduleResult) -> str:
    host = {stage: ms for stage, ms in result.stage_ms.items() if stage in HOST_WORK}
    if result.host_busy_fraction >= HOST_BOUND and host:
        largest = max(host, key=lambda stage: (host[stage], stage))
        cure = "; CUDA graphs or fewer, larger kernels would shrink it" if largest == Forward.phase else ""
        return f"To go faster, cut host work: {largest} is the largest part ({host[largest]:,.2f} ms a step){cure}."
    if result.device_busy_fraction >= DEVICE_BOUND and (result.launch_gap_fraction or 0.0) < 0.005:
        return "To go faster, the forward itself must get faster: no schedule has more to hide."
    return ""
