"""`batchsim plan` and `batchsim explain`: what to rent for some traffic, and what to work on first."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from batchsim.command import (
    Json,
    ProfileName,
    ScenarioFile,
    Schedules,
    blame,
    check_folder,
    give,
    outcome,
    progress_bar,
    read,
)
from batchsim.errors import InputError

MOST = 10  # times faster, beside what it is

PlanFile = Annotated[Path, typer.Argument(metavar="FILE", help="A plan in YAML.", show_default=False)]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Replace a value of the file.")]


def register(app: typer.Typer) -> None:
    """Give `app` the commands."""
    app.command()(plan)
    app.command()(explain)


def plan(
    file: PlanFile,
    sets: Sets = None,
    draws: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=10_000, help="Simulations that a candidate's intervals take.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write plan.json and report.html there.")] = None,
    as_json: Json = False,
) -> None:
    """Find the cheapest hardware, replicas, schedule and batch limit that meet objectives."""
    with outcome():
        check_folder(out)
        from batchsim.plan import plan as solved

        with blame(file), progress_bar(f"planning {file.name}") as progress:
            found = solved(file, sets=sets or (), draws=draws, progress=progress)
        from batchsim.report.plan import print_plan, write_plan_report

        give(
            found, out, "plan.json", as_json=as_json,
            show=lambda console: print_plan(console, found), report=lambda path: write_plan_report(path, found),
        )  # fmt: skip
        if found.partial is not None:
            raise KeyboardInterrupt


def explain(
    file: ScenarioFile,
    by: Annotated[float, typer.Option(metavar="SHARE", help="How much faster each stage gets, as a share.")] = 0.1,
    schedules: Schedules = None,
    sets: Sets = None,
    profile: ProfileName = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write explain.json and report.html there.")] = None,
    as_json: Json = False,
) -> None:
    """Tell what throughput and latency gain if a stage got faster, for every stage: what to work on first."""
    with outcome():
        check_folder(out)
        if not 0 < by <= MOST:  # nor NaN
            raise InputError("--by", "", f"{by:g}", f"a share above 0 and at most {MOST}, as 0.1 for 10% faster")
        from batchsim.explain import explain as explained

        kind, scenario, costs = read(file, sets, schedules, profile)
        with blame(file), progress_bar(f"explaining {file.name}") as progress:
            found = explained(kind, scenario, costs, by=by, base=file.parent, progress=progress)
        from batchsim.report.explain import print_explain, write_explain_report

        give(
            found, out, "explain.json", as_json=as_json,
            show=lambda console: print_explain(console, found), report=lambda path: write_explain_report(path, found),
        )  # fmt: skip
        if found.partial is not None:
            raise KeyboardInterrupt
