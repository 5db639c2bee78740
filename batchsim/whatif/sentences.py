"""The answer in sentences that a person can act on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from batchsim.whatif.replay import ADDED

if TYPE_CHECKING:
    from batchsim.whatif.answer import Answer, Prediction

CONFLICT = 0.02
LARGE = 0.03
DRIFT = 1.8


def sentences(answer: Answer) -> Iterator[str]:
    """What the predictions come to, the loop as it is first."""
    now = answer.schedules[answer.as_is]
    yield from _now(answer)
    yield from _overlap(answer)
    yield from _graphs(answer)
    yield from _host(answer)
    if answer.steady_step_ms is None:
        yield (
            "The untraced step time is not known (--steady-step-ms): the profiler's share was estimated, and the "
            "intervals are wider for it."
        )
    elif abs(answer.conflict) > CONFLICT:
        yield (
            f"The trace and the untraced step of {answer.steady_step_ms:.4g} ms do not go together: a replay of the "
            f"trace stays {answer.conflict:+.0%} off it; were they of the same batch, model and clocks?"
        )
    elif not 1 / DRIFT < answer.host_scale < DRIFT and now.host_ms > LARGE * now.step_ms:
        slower = answer.host_scale > 1
        times = answer.host_scale if slower else 1 / answer.host_scale
        yield (
            f"For the untraced step of {answer.steady_step_ms:.4g} ms the host would have been {times:.1f} times as "
            f"{'slow' if slower else 'fast'} as in the trace, the profiler's share taken out: is it of the same loop, "
            "on as quiet a machine?"
        )


def _ms(prediction: Prediction) -> str:
    low, high = prediction.step_ms_interval
    return f"{prediction.step_ms:.4g} ms ({low:.4g} to {high:.4g})"


def _now(answer: Answer) -> Iterator[str]:
    now = answer.schedules[answer.as_is]
    exposed = {phase: ms for phase, ms in now.exposed_ms.items() if phase != ADDED}
    total = sum(exposed.values())
    busy = f"the device is busy {now.device_busy_fraction:.0%} of a step of {now.step_ms:.4g} ms"
    if total < LARGE * now.step_ms or not exposed:
        yield f"As it is ({answer.as_is}), {busy}: hardly any host work sits between its steps."
        return
    phase, most = next(iter(exposed.items()))
    where = f", {most:.2g} ms of it in {phase}," if len(exposed) > 1 else ""
    yield f"As it is ({answer.as_is}), {busy}: host work of {total:.2g} ms a step{where} sits between device steps."


def _overlap(answer: Answer) -> Iterator[str]:
    from batchsim.whatif.answer import NOTHING

    now = answer.schedules[answer.as_is]
    if answer.as_is == "async":
        other = answer.schedules["sync"]
        yield f"The loop is asynchronous already; read at once, its results would make a step {_ms(other)}."
        return
    other = answer.schedules["async"]
    change = f"{now.step_ms:.4g} -> {_ms(other)}, {other.throughput_gain:+z.1%} throughput"
    added = "its events, buffers, copies and the kernels that feed results back"
    if other.throughput_gain < -NOTHING:
        yield (
            f"Async would lose: the host works {now.host_ms:.4g} of {now.step_ms:.4g} ms a step, so there is hardly "
            f"any wait to use, and {added} come on top: {change}."
        )
    elif other.throughput_gain <= NOTHING:
        why = "the host" if now.host_ms > 0.9 * now.step_ms else "the device"
        yield f"Async gives nothing: {why} is busy nearly all of the step either way: {change}."
    else:
        rest = sum(ms for ms in other.exposed_ms.values())
        hidden = "hides all of it" if rest < LARGE * other.step_ms else f"leaves {rest:.2g} ms of host work exposed"
        yield f"Async {hidden}: {change}; then the {_bounded(other)}."
    yield (
        "That takes that the next step can be prepared without the results of the one in flight (what it needs of "
        "them is carried over on the device)."
    )


def _bounded(prediction: Prediction) -> str:
    if prediction.bound_by == "device":
        return "device bounds it"
    if prediction.bound_by == "host":
        return f"host bounds it ({prediction.host_ms:.3g} ms a step)"
    return "host and the device wait for one another by turns"


def _graphs(answer: Answer) -> Iterator[str]:
    now = answer.schedules[answer.as_is]
    for name, what in (("graphs", "Captured in a graph"), ("no_graphs", "Without graphs, kernel by kernel")):
        changed = answer.schedules.get(f"{answer.as_is}_{name}")
        if changed is not None:
            other = answer.schedules[f"{'sync' if answer.as_is == 'async' else 'async'}_{name}"]
            other_name = "sync" if answer.as_is == "async" else "async"
            gain = f"{changed.throughput_gain:+z.0%}"
            yield f"{what}: {now.step_ms:.4g} -> {_ms(changed)}, {gain}; {other_name} {_ms(other)}."


def _host(answer: Answer) -> Iterator[str]:
    faster = answer.schedules[f"{answer.as_is}_host_x2"]
    slower = answer.schedules[f"{answer.as_is}_host_x0.5"]
    yield f"On a host twice as fast: {_ms(faster)}; on one half as fast: {_ms(slower)}."
