"""Measure forwards with prompts anew, and fit that part of a profile to them; all else in it stays as it is.

For a profile from a slow host, on which launches, not the device, set the length of short prompts' forwards.

python -m calibration.prefills measure llama-3.2-1b --out FILE                     # on a GPU, a minute
python -m calibration.prefills fit calibration/profiles/h200-llama-3.2-1b.json FILE
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from batchsim.files import write_json, write_text
from batchsim.model import MODELS
from batchsim.profile import load_profile
from batchsim.schedules import SCHEDULES
from calibration.cells import Cell, Samples, read_samples

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def measure(
    model: Annotated[str, typer.Argument(help="The model's shape, as llama-3.1-8b.")],
    out: Annotated[Path, typer.Option(help="The samples, JSON.")],
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    rounds: Annotated[int, typer.Option(help="How often each cell is run, in an order of its own.")] = 2,
) -> None:
    """Run every cell with prompts, and write the samples of its device stages."""
    from calibration.calibrate import BLOCK_SIZE, cells_of, executor_of, model_settings
    from calibration.device import prepare
    from calibration.executor import Executor
    from calibration.provenance import QuietCore, provenance

    prepare(device, "measure")
    shape = MODELS[model]
    settings = model_settings(shape, device)
    cells = [cell for cell in cells_of(settings) if cell.chunk]
    eager = Executor(executor_of(shape, device, settings).decoder, graphs=False)
    samples: dict[str, Samples] = {}
    with QuietCore(move=device == "cuda") as core:
        for round_ in range(rounds):
            random.Random(round_).shuffle(cells)
            for cell in cells:
                core.settle()
                batcher = cell.batcher(block_size=BLOCK_SIZE, num_kv_blocks=settings["num_kv_blocks"])
                found = read_samples(eager.run(SCHEDULES[cell.schedule](), batcher).spans, cell)
                kept = samples.setdefault(cell.key, {"prefill": [], "launch": []})
                for stage, values in kept.items():
                    values.extend(found.get(stage, []))
    command = f"python -m calibration.prefills measure {model} --device {device} --rounds {rounds}"
    told = [{"cell": asdict(cell), "samples": samples[cell.key]} for cell in sorted(cells, key=lambda cell: cell.key)]
    write_json(out, {"model": model, "provenance": provenance(device, command), "cells": told})


@app.command()
def fit(
    profile: Annotated[Path, typer.Argument(help="The profile to change, JSON.")],
    file: Annotated[Path, typer.Argument(help="What `measure` wrote.")],
) -> None:
    """Replace a profile's costs of forwards with prompts by a fit to the samples of `file`."""
    from calibration.calibrate import profile_text
    from calibration.fit import fit_prefill, summary

    old = load_profile(str(profile))
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    measured = {Cell(**entry["cell"]): entry["samples"] for entry in found["cells"]}
    prefill, ratios = fit_prefill(measured, old.device.decode, old.device.prefill.tile)
    others = [entry for entry in old.cells if not entry["cell"]["chunk"]]
    # Of the cells with prompts that tell the host's costs, those summaries stay.
    hosts = [entry for entry in old.cells if entry["cell"]["chunk"] and "schedule" in entry["stages"]]
    new = old.model_copy(
        update={
            "device": old.device.model_copy(update={"prefill": prefill, "prefill_ratios": ratios}),
            "cells": [*others, *hosts, *(summary(cell, samples) for cell, samples in measured.items())],
            "provenance": {**old.provenance, "prefills": found["provenance"]},
        }
    )
    write_text(profile, profile_text(new))
    worst = max(prefill.residuals.items(), key=lambda entry: abs(entry[1]))
    typer.echo(f"wrote {profile}: {len(measured)} cells, largest residual {worst[1]:+.1%} at {worst[0]}")


if __name__ == "__main__":
    sys.exit(app())
