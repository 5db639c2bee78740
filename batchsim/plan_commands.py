"""`batchsim plan` and `batchsim explain`: what to rent for some traffic, and what to work on first."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from batchsim.command import blame, check_folder, outcome, print_json, progress_bar
from batchsim.errors import InputError

MOST = 10  # times faster, beside what it is

PlanFile = Annotated[Path, typer.Argument(metavar="FILE", help="A plan in YAML.", show_default=False)]
ScenarioFile = Annotated[Path, typer.Argument(metavar="FILE", help="A scenario in YAML.", show_default=False)]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Replace a value of the file.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


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
        if as_json:
            print_json(found.to_json())
        else:
            from rich.console import Console

            from batchsim.report.plan import print_plan

            print_plan(Console(), found)
        if out is not None:
            from batchsim.files import write_json
            from batchsim.report.plan import write_plan_report

            write_json(out / "plan.json", found.to_json())
            write_plan_report(out / "report.html", found)
            typer.echo(f"wrote {out}: plan.json, report.html", err=True)
        if found.partial is not None:
            raise KeyboardInterrupt


def explain(
    file: ScenarioFile,
    by: Annotated[float, typer.Option(metavar="SHARE", help="How much faster each stage gets, as a share.")] = 0.1,
    schedules: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Schedules in place of the file's, as sync,async.")
    ] = None,
    sets: Sets = None,
    profile: Annotated[
        str | None, typer.Option("--profile", metavar="NAME|FILE", help="A profile in place of the file's.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write explain.json and report.html there.")] = None,
    as_json: Json = False,
) -> None:
    """Tell what throughput and latency gain if a stage got faster, for every stage: what to work on first."""
    with outcome():
        check_folder(out)
        if not 0 < by <= MOST:  # nor NaN
            raise InputError("--by", "", f"{by:g}", f"a share above 0 and at most {MOST}, as 0.1 for 10% faster")
        from batchsim.command import read
        from batchsim.explain import explain as explained

        kind, scenario, costs = read(file, sets, schedules, profile)
        with blame(file), progress_bar(f"explaining {file.name}") as progress:
            found = explained(kind, scenario, costs, by=by, base=file.parent, progress=progress)
        if as_json:
            print_json(found.to_json())
        else:
            from rich.console import Console

            from batchsim.report.explain import print_explain

            print_explain(Console(), found)
        if out is not None:
            from batchsim.files import write_json
            from batchsim.report.explain import write_explain_report

            write_json(out / "explain.json", found.to_json())
            write_explain_report(out / "report.html", found)
            typer.echo(f"wrote {out}: explain.json, report.html", err=True)
        if found.partial is not None:
            raise KeyboardInterrupt
