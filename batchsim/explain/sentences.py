"""What to work on first, in words."""

from __future__ import annotations

from batchsim.explain.result import NEGLIGIBLE, Explained, Explanation

_WORDS = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "E2E"}


def sentences(found: Explanation) -> list[str]:
    """For each schedule what helps most, what comes next, and what would help nothing."""
    told = [] if found.partial is None else [f"This is not the whole answer: {found.partial}."]
    return [*told, *(_of(found, each) for each in found.schedules.values())]


def measure_words(measure: str) -> str:
    """`throughput`, or `p99 TTFT`."""
    latency, dot, statistic = measure.partition(".")
    return f"{statistic} {_WORDS.get(latency, latency)}" if dot else measure


def _of(found: Explanation, each: Explained) -> str:
    if not each.gains:
        return f"{each.schedule}: of no stage is it known yet what it is worth."
    measure, (first, *rest), least = each.measure, each.gains, NEGLIGIBLE * found.by
    faster = f"{100 * found.by:.4g}% faster"
    gained = f"more {measure}" if measure.startswith("throughput") else f"off {measure_words(measure)}"
    if first.sure(measure) < least:
        if found.partial is not None:
            return f"{each.schedule}: none of the stages so far gives {gained} worth the name."
        return f"{each.schedule}: no stage that is {faster} gives {gained} worth the name."
    so_far = "" if found.partial is None else " of these"
    text = (
        f"{each.schedule}: work on {first.stage} first{so_far} ({first.text}): {faster}, it gives "
        f"{first.at(measure):.1%} {gained}"
    )
    if rest and rest[0].sure(measure) >= least:
        text += f"; the next, {rest[0].stage}, {rest[0].at(measure):.1%}"
    text += f"; everything at once, {each.everything.at(measure):.1%}."
    host = [gain.sure(measure) for gain in each.gains if gain.side == "host"]
    if host and first.side != "host" and sum(host) < least and found.partial is None:
        why = "too short to matter" if each.schedule == "sync" else "hidden behind the device's"
        text += f" The host's work is {why}: a faster host gives nothing."
    return text
