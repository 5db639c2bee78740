"""The command line: reads options, calls the library, prints and writes what it returns.

Libraries are imported inside the commands, so that `batchsim --help` answers at once.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from batchsim import __version__
from batchsim.command import (
    Json,
    ProfileName,
    ScenarioFile,
    Schedules,
    blame,
    check_device,
    check_folder,
    give,
    need_cuda,
    need_torch,
    outcome,
    print_json,
    progress_bar,
    read,
    tell,
)
from batchsim.errors import InputError, shown
from batchsim.learn_commands import register
from batchsim.plan_commands import register as register_plan
from batchsim.sweep_commands import register as register_sweep

if TYPE_CHECKING:
    from batchsim.command import Tell
    from batchsim.kinds import AnyProfile, AnyScenario, Kind
    from batchsim.profile import Profile
    from batchsim.result import Run
    from batchsim.training_profile import TrainingProfile

PERCENTILES = ("mean", "p50", "p90", "p95", "p99")

app = typer.Typer(
    name="batchsim",
    help="Predict what a CPU/GPU batching pipeline will do, and prove it on the GPU.",
    epilog="Exit codes: 0 done, 1 a failed run, 2 refused input.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ScenarioFiles = Annotated[list[Path], typer.Argument(metavar="FILE...", help="Scenarios in YAML.", show_default=False)]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Replace a value of the file, as workload.num_prompts=64."),
]
Out = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Write result.json, report.html and trace.json into this folder.")
]
Device = Annotated[str, typer.Option(metavar="cuda|cpu", help="The device to measure.")]


def main() -> None:
    """The `batchsim` command."""
    app(prog_name="batchsim")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"batchsim {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    file: ScenarioFile,
    schedules: Schedules = None,
    sets: Sets = None,
    profile: ProfileName = None,
    out: Out = None,
    draws: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, max=1000, help="Simulations that 90% intervals are made from; 0: none."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Simulate a scenario at the measured costs of a profile."""
    with outcome():
        kind, scenario, costs = read(file, sets, schedules, profile)
        check_folder(out)
        with blame(file), progress_bar(f"simulating {file.name}") as progress:
            status = None if progress is None else partial(progress, None)
            predicted = kind.simulate(scenario, costs, progress=progress, status=status, base=file.parent)
            interrupted = predicted.interrupted
            if not interrupted:
                from batchsim.intervals import again, of_run

                if status is not None:
                    status("with other costs, as they may be")
                try:
                    predicted = of_run(
                        predicted, scenario, costs, again(kind, file.parent), draws=draws, progress=progress
                    )
                except KeyboardInterrupt:
                    interrupted = True
            if out is not None and not interrupted and scenario.kind != "training":
                from dataclasses import replace

                from batchsim.load import load_curve

                if status is not None:
                    status("at other loads")
                try:
                    simulate = partial(kind.simulate, costs=costs, checks=False, base=file.parent)  # it fitted
                    curve = load_curve(scenario, simulate, base=file.parent, progress=progress)
                except KeyboardInterrupt:
                    interrupted = True
                else:
                    predicted = replace(predicted, load_curve=curve)

        from batchsim.result import run_json

        value = run_json(predicted)
        tell(value, predicted, None, out, as_json=False, quiet=as_json)
        if as_json:
            for name, result in predicted.results.items():
                value["schedules"][name]["engine_s"] = result.engine_s
            print_json(value)
        if interrupted:
            raise KeyboardInterrupt


@app.command()
def validate(
    files: ScenarioFiles,
    device: Device = "cuda",
    schedules: Schedules = None,
    sets: Sets = None,
    profile: ProfileName = None,
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Executions of each schedule.")] = 3,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Simulate scenarios, execute them on a device, and compare the two.

    Several files print a list of JSON objects and write into a folder each, named after the file.
    """
    with outcome():
        check_device(device)
        check_folder(out)
        # All input is checked before any time is spent on a device.
        inputs = [(file, *read(file, sets, schedules, profile)) for file in files]
        need_torch()
        from batchsim.result import validation_json

        benches: dict[str, Any] = {}
        told = []
        for file, kind, scenario, costs in inputs:
            if costs is None:
                wanted = "a model and its profile: a table of times has nothing to execute"
                raise InputError(str(file), "costs", "a table", wanted)
            with blame(file), progress_bar(f"validating {file.name}") as progress:
                bench = benches.setdefault(scenario.kind, None) or kind.bench(device)
                benches = {scenario.kind: bench}  # what another kind's holds of the device is needed
                predicted, measured = kind.validate(
                    scenario, costs, device, repeats=repeats, progress=progress, bench=bench, base=file.parent
                )
                from calibration.executed import with_intervals

                predicted = with_intervals(predicted, measured, scenario, costs, base=file.parent)
            told.append(validation_json(predicted, measured))
            folder = out / file.stem if out is not None and len(files) > 1 else out
            tell(told[-1], predicted, measured, folder, as_json=False, quiet=as_json)
        if as_json:
            print_json(told[0] if len(told) == 1 else told)


@app.command()
def tiles(
    file: ScenarioFile,
    sets: Sets = None,
    profile: ProfileName = None,
    device: Annotated[str | None, typer.Option(metavar="cuda", help="Measure on this device as well.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write result.json and report.html into this folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare the ways to synchronise the tiles of dependent kernels."""
    with outcome():
        if device not in (None, "cuda"):
            raise InputError("--device", "", shown(device), "cuda")
        check_folder(out)
        from batchsim.refusal import Override
        from batchsim.tiles.scenario import load

        overrides: list[str | Override] = list(sets or ())
        if profile is not None:
            overrides.append(Override("--profile", ("profile",), profile))
        scenario = load(file, overrides)
        if device is not None:
            need_cuda()

        from batchsim.tiles.profile import load_tile_profile
        from batchsim.tiles.result import compare_all

        costs = load_tile_profile(scenario.profile, Path() if profile is not None else file.parent)
        with blame(file), progress_bar(f"simulating {file.name}") as progress:
            found = compare_all(scenario, costs, tell=progress)
        if device is not None:
            from calibration.tile_trace import measure

            with progress_bar(f"measuring {file.name}") as progress:
                found = found.with_measured(lambda case: measure(case), tell=progress)
        from batchsim.tiles.report import print_tiles, write_tiles_report

        give(
            found, out, "result.json", as_json=as_json,
            show=lambda console: print_tiles(console, found), report=lambda path: write_tiles_report(path, found),
        )  # fmt: skip


@app.command()
def calibrate(
    model: Annotated[str, typer.Option(metavar="NAME", help="The model's shape, as llama-3.1-8b.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The profile to write, JSON.")],
    device: Device = "cuda",
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="How often each cell of the grid is run.")] = 2,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted calibration.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a finished or interrupted one.")] = False,
    training: Annotated[bool, typer.Option("--training", help="Measure training the model, not serving it.")] = False,
) -> None:
    """Measure a device and this host, and write a profile."""
    with outcome():
        from batchsim.model import MODELS, SERVICES, TRAINED
        from batchsim.refusal import choice

        known = list(TRAINED) if training else [*MODELS, *SERVICES]
        if model not in known:
            raise InputError("--model", "", shown(model), choice(model, known))
        if training and resume:
            raise InputError("--resume", "", "--training as well", "a new calibration: it keeps whole rounds alone")
        if resume and force:
            raise InputError("--resume", "", "--force as well", "one of the two")
        if out.is_dir():
            raise InputError("--out", "", f"the folder {out}", "a file")
        partial = out.with_name(f"{out.name}.partial")
        if out.exists() and not force:
            raise InputError("--out", "", f"a finished profile {out}", "a new file, or --force")
        if partial.exists() and not (resume or force):
            raise InputError("--out", "", f"an interrupted calibration {partial}", "--resume or --force")
        check_device(device)
        need_torch()
        with progress_bar(f"calibrating {model}") as progress:
            if training:
                from calibration.training.calibrate import calibrate as train

                train(model, device, out, precisions=("mixed", "bf16"), rounds=rounds)
            elif model in SERVICES:
                from calibration.services.calibrate import calibrate as serve

                serve(model, device, out, rounds=rounds, resume=resume, progress=progress)
            else:
                from calibration.calibrate import calibrate as measure

                measure(model, device, out, rounds=rounds, resume=resume, progress=progress)
        typer.echo(f"wrote {out}", err=True)


@app.command()
def memory(
    file: ScenarioFile,
    sets: Sets = None,
    profile: ProfileName = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write memory.json and report.html there.")] = None,
    as_json: Json = False,
) -> None:
    """Tell where the device's memory goes, the largest batch that fits, and what is in the way of a larger one."""
    with outcome():
        _, scenario, costs = read(file, sets, None, profile)
        check_folder(out)
        if costs is None:
            raise InputError(str(file), "costs", "a table", "a model: a table of times says nothing of memory")
        from batchsim.memory import breakdown, library_for

        library = library_for(str(costs.provenance.get("device")))
        with blame(file):
            found = breakdown(scenario, costs.device_memory_bytes, library, file.parent)
        from batchsim.report.memory import print_memory, write_memory_report

        give(
            found, out, "memory.json", as_json=as_json, show=lambda console: print_memory(console, found),
            report=lambda path: write_memory_report(path, found, scenario.model_dump(mode="json")),
        )  # fmt: skip


@app.command()
def hardware(as_json: Json = False) -> None:
    """List the catalogue of devices that scenarios may name as their hardware."""
    with outcome():
        from batchsim.hardware import CATALOGUE

        if as_json:
            print_json({name: device.model_dump(mode="json") for name, device in CATALOGUE.items()})
            return
        from rich.console import Console

        from batchsim.hardware.table import print_catalogue

        print_catalogue(Console(), CATALOGUE)


@app.command()
def tune(
    file: ScenarioFile,
    slo_ms: Annotated[
        float | None, typer.Option(metavar="MS", min=1e-6, help="Serve as much as this latency allows (slo.e2e_ms).")
    ] = None,
    percentile: Annotated[
        str, typer.Option(metavar="NAME", help="Of the latency: mean, p50, p90, p95 or p99.")
    ] = "p99",
    schedules: Schedules = None,
    sets: Sets = None,
    profile: ProfileName = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write tuning.json and report.html there.")] = None,
    as_json: Json = False,
) -> None:
    """Choose batch size and delay of a service, or micro-batch and checkpointing of a training run."""
    with outcome():
        kind, scenario, costs = read(file, sets, schedules, profile)
        check_folder(out)
        if percentile not in PERCENTILES:
            raise InputError("--percentile", "", shown(percentile), "mean, p50, p90, p95 or p99")
        with blame(file), progress_bar(f"tuning {file.name}") as progress:
            found, report = _tune(kind, scenario, costs, percentile, slo_ms, file.parent, progress)
        give(
            found, out, "tuning.json", as_json=as_json,
            show=lambda console: report.print_tuning(console, scenario.name, found),
            report=lambda path: report.write_tuning(path, scenario.name, scenario.model_dump(mode="json"), found),
        )  # fmt: skip


def _tune(
    kind: Kind, scenario: AnyScenario, costs: AnyProfile, percentile: str, slo_ms: float | None, base: Path,
    progress: Tell | None,
) -> tuple[Any, Any]:  # fmt: skip
    """What was found, and the module that shows it."""
    from batchsim.intervals import again

    def simulate(candidate: AnyScenario) -> Run:
        return kind.simulate(candidate, costs, checks=False, base=base)

    if scenario.kind == "training":
        if slo_ms is not None:
            raise InputError(
                "--slo-ms", "", f"{slo_ms:g}", "a scenario of kind dynamic for it: training has no requests"
            )
        from batchsim.report import tuning_training
        from batchsim.tune import training

        found: Any = training.tune(
            scenario, simulate, cast("TrainingProfile", costs), progress=progress, again=again(kind, base)
        )
        return found, tuning_training
    if scenario.kind == "dynamic":
        from batchsim.kinds import check_memory
        from batchsim.report import tuning
        from batchsim.tune import dynamic

        check_memory(scenario, costs, base)

        bound_ms = slo_ms or (scenario.slo.e2e_ms if scenario.slo is not None else None)
        profile = cast("Profile | None", costs)
        found = dynamic.tune(
            scenario, simulate, profile, percentile=percentile, bound_ms=bound_ms, progress=progress,
            again=again(kind, base),
        )  # fmt: skip
        return found, tuning
    wanted = "dynamic or training: the page of `batchsim run --out` shows what a serving loop does at other loads"
    raise InputError(None, "kind", scenario.kind, wanted)


register(app)
register_sweep(app)
register_plan(app)


@app.command()
def schema() -> None:
    """Print the JSON schema of a scenario, for editors."""
    with outcome():
        from batchsim.scenario import scenario_json_schema

        typer.echo(json.dumps(scenario_json_schema(), indent=2, sort_keys=True))
