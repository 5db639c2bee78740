"""Results put into words: what happened, why, and what a person can do about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from batchsim.operations import HOST_PHASES, Forward, Synchronize
from batchsim.report.shown import LATENCY_NAMES, arrives, error_text, ms_text, spoken, stage_label, unit, varied
from batchsim.result import Run, ScheduleResult, errors

HOST_WORK = tuple(phase for phase in HOST_PHASES if phase != Synchronize.phase)

# Below, a gain is noise; above, host or device count as the bottleneck.
NEGLIGIBLE_GAIN = 0.005
NEGLIGIBLE_LOSS = 0.001
HOST_BOUND = 0.95
DEVICE_BOUND = 0.99

# How much throughput, of schedules that serve what arrives, may differ by how soon the last requests are done.
_LAST_REQUESTS = 0.05

_NO_REQUESTS = "no_requests"
_ALONE = "Preparing batches ahead can hide host time: compare with --schedules sync,async."


def idle_shares(result: ScheduleResult) -> dict[str, float]:
    """The share of the total time that the device idled for each stage, largest first."""
    total_ns = result.total_s * 1e9
    ordered = sorted(result.idle_ns.items(), key=lambda item: (-item[1], item[0]))
    return {stage: ns / total_ns for stage, ns in ordered if ns}


def host_work_ms(result: ScheduleResult) -> float:
    """Host time of a mean step in which the host does not wait for the device."""
    return result.step_ms["mean"] * _host_busy(result)


def headline(predicted: Run, measured: Run | None = None) -> str:
    """One sentence: what the alternatives to sync change; without sync, what each schedule reaches."""
    run = measured or predicted
    baseline = run.results.get("sync")
    others = [result for name, result in run.results.items() if name != "sync"]
    latencies = varied(predicted)
    if baseline is None or not others:
        return " ".join(f"{_reached(result, latencies)}." for result in run.results.values())
    verb = "is" if measured else "should be"
    parts = []
    for other in others:
        gain = _gain(baseline, other)
        if _keep_up(predicted, baseline, other):
            verdict = f"{'serves' if measured else 'should serve'} what arrives, as sync does"
        elif abs(gain) < NEGLIGIBLE_GAIN:
            verdict = f"{verb} as fast as sync"
        else:
            verdict = f"{verb} {abs(gain):.1%} {'faster' if gain > 0 else 'slower'} than sync"
        part = f"{other.schedule} {verdict}: {_tokens(baseline, other)}"
        if measured is not None and other.schedule in predicted.results and "sync" in predicted.results:
            part += f" (predicted {_gain(predicted.results['sync'], predicted.results[other.schedule]):+.1%})"
        parts.append(part + (f", {changes}" if latencies and (changes := _latencies(baseline, other)) else ""))
    return ("Measured: " if measured else "") + "; ".join(parts) + "."


def causes(run: Run) -> list[str]:
    """Sentences that say where the device's time goes under each schedule, and what follows from it."""
    baseline = run.results.get("sync")
    sentences = []
    for result in run.results.values():
        sentence = _idle_sentence(result)
        if baseline is None or result is baseline:
            hint = f" {_ALONE}" if list(run.results) == ["sync"] and _avoidable(result) >= 0.01 else ""
            sentences.append(sentence + hint)
        else:
            comparison = _comparison(baseline, result, keep_up=_keep_up(run, baseline, result))
            sentences.append(f"{comparison} {sentence} {_next_step(result)}".strip())
    return sentences


def alerts(runs: Iterable[Run]) -> list[str]:
    """What makes figures doubtful: runs that were interrupted, queues that only grow, requests that were lost."""
    told = list(runs)
    return [
        f"{name}{', ' + run.source if len(told) > 1 else ''}: {text}"
        for run in told
        for name, result in run.results.items()
        for text in (result.partial, result.unstable, _lost(result))
        if text is not None
    ]


def lost_share(result: ScheduleResult) -> float:
    """The share of requests that were refused or dropped."""
    found = result.outcomes
    return (found["refused"] + found["dropped"]) / max(found["arrivals"], 1) if found else 0.0


def _lost(result: ScheduleResult) -> str | None:
    """A sentence where more than a few requests get no answer, or a late one."""
    found = result.outcomes
    if not found or max(lost_share(result), found["served_late"] / max(found["arrivals"], 1)) < NEGLIGIBLE_LOSS:
        return None
    kinds = {
        "refused": "refused (the queue was full)",
        "dropped": "dropped (they waited too long)",
        "served_late": "served late",
    }
    parts = [f"{found[kind]:,} {text}" for kind, text in kinds.items() if found[kind]]
    breaks = result.breaking_requests_per_s
    more = f"; no more than {breaks:,.0f} requests/s can be served" if breaks is not None else ""
    return f"of {found['arrivals']:,} requests {', '.join(parts)}{more}"


def effort(run: Run) -> list[str]:
    """What simulating each schedule took, in a line each."""
    lines = []
    for name, result in run.results.items():
        if result.engine_s is not None:
            what = "requests" if "requests" in result.counts else "steps"
            parts = [f"{result.counts[what]:,} {what}"]
            counts = {"iterations": result.iterations, "decisions": result.decisions, "events": result.events}
            parts += [f"{count:,} {what}" for what, count in counts.items() if count is not None]
            lines.append(f"{name}: simulated {', '.join(parts)} in {ms_text(result.engine_s * 1e3)}")
    return lines


def agreement(predicted: Run, measured: Run) -> str:
    """How far the prediction is from the execution, in one sentence a schedule."""
    sentences = []
    for name, result in measured.results.items():
        if name in predicted.results:
            error = errors(predicted.results[name], result)
            speed = error_text(result.throughput_key, error[result.throughput_key])
            busy = error_text("device_busy_fraction", error["device_busy_fraction"])
            latencies = [
                f", {LATENCY_NAMES[latency]} {statistic} {error_text(key, error[key])}"
                for latency, statistic in spoken(result)
                if (key := f"latency_ms.{latency}.{statistic}") in error and varied(predicted)
            ]
            sentences.append(f"{name}: {unit(result)} {speed}, device busy {busy}{''.join(latencies)}")
    return "Prediction minus execution: " + "; ".join(sentences) + "."


def unique_warnings(runs: Iterable[Run]) -> list[str]:
    """The warnings of all results, each once, in order."""
    return list(dict.fromkeys(text for run in runs for result in run.results.values() for text in result.warnings))


def transfer_notes(provenances: Iterable[Mapping[str, Any]]) -> list[str]:
    """From which device to which the costs of runs were transferred, each once, in order."""
    from batchsim.profile import Transfer

    found = [Transfer.model_validate(each["transfer"]) for each in provenances if "transfer" in each]
    return list(dict.fromkeys(each.sentence for each in found))


def _keep_up(run: Run, baseline: ScheduleResult, other: ScheduleResult) -> bool:
    """Whether what limits both schedules is that no more requests arrive."""
    both = (baseline, other)
    stable = all(each.unstable is None and lost_share(each) < _LAST_REQUESTS for each in both)
    return arrives(run) and stable and abs(_gain(baseline, other)) < _LAST_REQUESTS


def _gain(baseline: ScheduleResult, other: ScheduleResult) -> float:
    return other.throughput / baseline.throughput - 1


def _tokens(baseline: ScheduleResult, other: ScheduleResult) -> str:
    left, right = baseline.throughput, other.throughput
    return f"{left:,.0f} \N{RIGHTWARDS ARROW} {right:,.0f} {unit(baseline)}"


def _latencies(baseline: ScheduleResult, other: ScheduleResult) -> str:
    """`TTFT p50 81.2 ms -> 60.4 ms, ...`, of what both have."""
    parts = []
    for name, statistic in spoken(baseline):
        left, right = (result.latency_ms.get(name, {}).get(statistic) for result in (baseline, other))
        if left is not None and right is not None:
            change = f"{ms_text(left)} \N{RIGHTWARDS ARROW} {ms_text(right)}"
            parts.append(f"{LATENCY_NAMES[name]} {statistic} {change}")
    return ", ".join(parts)


def _reached(result: ScheduleResult, latencies: bool) -> str:
    text = f"{result.schedule}: {result.throughput:,.0f} {unit(result)}"
    found = [
        f", {LATENCY_NAMES[name]} {statistic} {ms_text(result.latency_ms[name][statistic])}"
        for name, statistic in spoken(result)
        if latencies and name in result.latency_ms
    ]
    return text + "".join(found)


def _avoidable(result: ScheduleResult) -> float:
    """The share of the time in which the device idles although there are requests."""
    return 1 - result.device_busy_fraction - idle_shares(result).get(_NO_REQUESTS, 0.0)


def _host_busy(result: ScheduleResult) -> float:
    """The share of the time with requests in which the host works."""
    spent = 1 - idle_shares(result).get(_NO_REQUESTS, 0.0)
    return min(result.host_busy_fraction / spent, 1.0) if spent > 0 else 0.0


def _host_bound(result: ScheduleResult) -> bool:
    return _host_busy(result) >= HOST_BOUND


def _idle_sentence(result: ScheduleResult) -> str:
    shares = idle_shares(result)
    idle = 1 - result.device_busy_fraction
    if idle < 0.0005:
        sentence = f"{result.schedule} keeps the device busy {result.device_busy_fraction:.2%} of the time."
    else:
        unasked = shares.pop(_NO_REQUESTS, 0.0)
        unasked = unasked if unasked >= 0.0005 else 0.0
        largest = [(stage, share) for stage, share in list(shares.items())[:3] if share >= 0.0005]
        parts = [f"{share * 100:.1f} for {stage_label(stage)}" for stage, share in largest]
        rest = idle - unasked - sum(share for _, share in largest)
        if rest >= 0.0005 and largest:
            parts.append(f"{rest * 100:.1f} for the rest")
        if parts:
            parts[0] = parts[0].replace(" for ", " waiting for " if unasked else " points waiting for ", 1)
        if unasked:
            parts.insert(0, f"{unasked * 100:.1f} points with no request to serve")
        detail = f": {', '.join(parts)}" if parts else ""
        sentence = f"{result.schedule} leaves the device idle {idle:.{1 if idle >= 0.01 else 2}%} of the time{detail}."
    gaps = result.launch_gap_fraction or 0.0
    if gaps >= 0.005:
        sentence += f" Another {gaps:.1%} pass inside its forwards, waiting for the next kernel launch."
    return sentence


def _comparison(baseline: ScheduleResult, other: ScheduleResult, *, keep_up: bool) -> str:
    name, gain = other.schedule, _gain(baseline, other)
    tokens = _tokens(baseline, other)
    idle = _avoidable(baseline)
    hidden = idle - _avoidable(other)
    if keep_up:
        changes = _latencies(baseline, other)
        return f"{name} serves what arrives, as sync does: {tokens} ({gain:+.1%}){': ' * bool(changes)}{changes}."
    if gain >= NEGLIGIBLE_GAIN:
        if hidden >= 0.001:
            some = 1 - baseline.device_busy_fraction - idle >= 0.0005
            which = f"the {idle * 100:.1f} points with requests" if some else f"these {idle * 100:.1f} points"
            return f"{name} hides {hidden * 100:.1f} of {which}: {tokens} ({gain:+.1%})."
        return f"{name} is faster: {tokens} ({gain:+.1%})."
    host_bound = _host_bound(other)
    work = f"{host_work_ms(other):,.2f} ms of host work a step against {host_work_ms(baseline):,.2f} ms"
    if gain > -NEGLIGIBLE_GAIN:
        reason = f"the host limits both ({work})" if host_bound else "there was little idle time to hide"
        return f"{name} changes little: {tokens} ({gain:+.1%}), since {reason}."
    if host_bound:
        reason = f"the host is the bottleneck, busy {_host_busy(other):.1%} of the time, with {work}"
    else:
        reason = f"a step takes {other.step_ms['mean']:,.2f} ms against {baseline.step_ms['mean']:,.2f} ms"
    return f"{name} is slower: {tokens} ({gain:+.1%}): {reason}."


def _next_step(result: ScheduleResult) -> str:
    host = {stage: ms for stage, ms in result.stage_ms.items() if stage in HOST_WORK}
    if _host_bound(result) and host:
        largest = max(host, key=lambda stage: (host[stage], stage))
        cure = "; CUDA graphs or fewer, larger kernels would shrink it" if largest == Forward.phase else ""
        return f"To go faster, cut host work: {largest} is the largest part ({host[largest]:,.2f} ms a step){cure}."
    if result.device_busy_fraction >= DEVICE_BOUND and (result.launch_gap_fraction or 0.0) < 0.005:
        return "To go faster, the forward itself must get faster: no schedule has more to hide."
    return ""
