"""What `batchsim learn` found in a trace: a short table, and the same as data."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from batchsim.learned import Copy, Kernels, LearnedProfile
from batchsim.report.whatif_words import found_in, phase_label
from batchsim.whatif.phases import host_ns
from batchsim.whatif.timers import waited_ns
from batchsim.whatif.traced import replay_traced, traced_ms

SCHEMA_VERSION = 1
_SHOWN_PHASES = 20


def summary(profile: LearnedProfile) -> dict[str, Any]:
    """What a step consists of, on average over the steps, as plain data; times in milliseconds, as traced."""
    count = len(profile.steps)
    operations = [operation for step in profile.steps for operation in step.operations]
    launches = [operation for operation in operations if isinstance(operation, Kernels)]
    graphs = [operation for operation in launches if operation.nodes is not None]
    copies = [operation for operation in operations if isinstance(operation, Copy)]
    phases: dict[str, dict[str, float]] = {phase: {"host_ms": 0.0, "waits_ms": 0.0} for phase in profile.phases}
    for operation in operations:
        phases[operation.phase]["host_ms"] += host_ns(operation) / count / 1e6
        phases[operation.phase]["waits_ms"] += waited_ns(operation) / count / 1e6
    total = sum(phase["host_ms"] for phase in phases.values())
    replayed = replay_traced(profile.steps, profile.launch_ns)
    step_ms, replayed_ms = traced_ms(profile), float(replayed.step_ns[0]) / 1e6
    return {
        "schema_version": SCHEMA_VERSION,
        "source": profile.source,
        "device": profile.device,
        "steps": profile.steps_in_trace,
        "steps_found_by": profile.found_by,
        "steps_kept": count,
        "steady_step_ms": profile.steady_step_ms,
        "traced_step_ms": step_ms,
        "replayed_step_ms": replayed_ms,
        "replay_error": replayed_ms / step_ms - 1,
        "device_busy_fraction": float(replayed.busy[0]),
        "kernels": sum(len(each.host_ns) for each in launches if each.nodes is None) / count,
        "graphs": len(graphs) / count,
        "graph_nodes": sum(each.nodes or 0 for each in graphs) / count,
        "copies": len(copies) / count,
        "copied_bytes": sum(each.bytes for each in copies) / count,
        "waits": sum(waited_ns(each) > 0 for each in operations) / count,
        "waits_ms": sum(phase["waits_ms"] for phase in phases.values()),
        "host_ms": total,
        "phases": {
            name: phase | {"share": phase["host_ms"] / total if total else 0.0} for name, phase in phases.items()
        },
        "untraced_phases_ms": profile.phases_ms,
        "notes": profile.notes,
    }


def print_learned(console: Console, profile: LearnedProfile) -> None:
    """Print what was found, the host's phases, and notes."""
    found = summary(profile)
    console.print()
    console.print(Text.assemble((profile.source, "bold cyan"), ("  learned", "dim")))
    console.print(Text(found_in(profile), style="dim"))
    console.print()
    table = _table("a step, as traced")
    table.add_column("", justify="right")
    steady = found["steady_step_ms"]
    off = found["replay_error"]
    rows = {
        "step, ms": f"{found['traced_step_ms']:,.3f}",
        "without a profiler, ms": "not known" if steady is None else f"{steady:,.3f}",
        "the replay gives, ms": f"{found['replayed_step_ms']:,.3f} ({off:+.1%})",
        "device busy": f"{found['device_busy_fraction']:.1%}",
        "host works, ms": f"{found['host_ms']:,.3f}",
        "kernels launched": f"{found['kernels']:,.4g}",
        "graphs launched": f"{found['graphs']:,.4g}"
        + (f", of {found['graph_nodes'] / found['graphs']:,.4g} nodes" if found["graphs"] else ""),
        "copies": f"{found['copies']:,.4g}, of {found['copied_bytes'] / 1e3:,.4g} kB in all",
        "waits for the device": f"{found['waits']:,.3g}, {found['waits_ms']:,.3f} ms in all",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table, "", sep="\n")
    console.print(_phases(found), "", sep="\n")
    for note in profile.notes:
        console.print(Text(f"note: {note}", style="yellow"))


def _phases(found: dict[str, Any]) -> Table:
    untraced = found["untraced_phases_ms"]
    table = _table("host phase")
    for column in ("works, ms", "share", "waits, ms", *(["untraced, ms"] if untraced else [])):
        table.add_column(column, justify="right", header_style="bold", no_wrap=True)
    ordered = sorted(found["phases"].items(), key=lambda item: -item[1]["host_ms"])
    for name, phase in ordered[:_SHOWN_PHASES]:
        cells = [f"{phase['host_ms']:,.3f}", f"{phase['share']:.1%}", f"{phase['waits_ms']:,.3f}"]
        if untraced:
            cells.append(f"{untraced[name]:,.3f}" if name in untraced else "-")
        table.add_row(phase_label(name), *cells)
    if rest := ordered[_SHOWN_PHASES:]:
        sums = {key: sum(phase[key] for _, phase in rest) for key in ("host_ms", "share", "waits_ms")}
        table.add_row(
            f"{len(rest)} others", f"{sums['host_ms']:,.3f}", f"{sums['share']:.1%}", f"{sums['waits_ms']:,.3f}"
        )
    return table


def _table(first: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, header_style="bold", overflow="fold")
    return table
