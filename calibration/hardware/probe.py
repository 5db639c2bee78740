"""Time products and forwards on parts of a device (green contexts): what the law of transfer is fitted to.

python -m calibration.hardware.probe measure --device cuda --out DIR --sms 24,48,56,80,88,112,120,132
python -m calibration.hardware.fit keep DIR

A process for each part, since what limits a stream lasts as long as the process; it writes c24.json and so on.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from batchsim.command import outcome
from batchsim.errors import InputError, one_of
from batchsim.files import write_json
from calibration.cells import Cell

# Of loops that decode, and of those that prefill.
DECODE_STEPS, PREFILL_STEPS = 16, 10
BLOCK_SIZE = 16

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Sizes:
    """How much is measured of each model; `long` prompts follow a context of that length."""

    models: tuple[str, ...]
    rows: tuple[int, ...]
    """Of products in graphs."""
    profiled: tuple[int, ...]
    """Of products in the profiler."""
    head_rows: int
    """At most, of the LM head: it sees a row of each sequence."""
    seqs: tuple[int, ...]
    contexts: tuple[int, ...]
    prompt: int
    prompts: tuple[int, ...]
    """Tokens of a step, in prompts of `prompt`."""
    long: int
    chunks: tuple[int, ...]
    mixed: tuple[int, int, int]
    """Tokens of a prompt, beside so many sequences that decode, with so long a context each."""
    max_model_len: int
    kv_tokens: int


CUDA = Sizes(
    models=("llama-3.2-1b", "llama-3.1-8b"),
    rows=(1, 8, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096),
    profiled=(
        1, 2, 5, 8, 11, 16, 20, 26, 32, 40, 52, 64, 80, 96, 104, 128, 160, 192, 200, 256, 320, 512, 768, 1024, 1280,
        1536, 1792, 2048, 3072, 4096, 6144, 8192,
    ),
    head_rows=256, seqs=(1, 4, 8, 16, 32, 64, 96, 128, 192, 256), contexts=(32, 1000, 4000), prompt=256,
    prompts=(256, 512, 1024, 2048, 4096), long=2048, chunks=(512, 2048), mixed=(1984, 64, 500),
    max_model_len=4200, kv_tokens=300_000,
)  # fmt: skip
CPU = Sizes(
    models=("tiny",), rows=(1, 4), profiled=(2,), head_rows=2, seqs=(1, 4), contexts=(32,), prompt=32, prompts=(64,),
    long=64, chunks=(32,), mixed=(30, 2, 40), max_model_len=160,
    kv_tokens=1600,
)  # fmt: skip
SIZES = {"cuda": CUDA, "cpu": CPU}


def cells_of(sizes: Sizes) -> list[Cell]:
    """The forwards that are timed: those that fit the cache."""
    found = [Cell("async", True, seqs, at, steps=DECODE_STEPS) for seqs in sizes.seqs for at in sizes.contexts]
    shapes = [(tokens // sizes.prompt, 0, sizes.prompt, 0, 0) for tokens in sizes.prompts]
    shapes += [(1, sizes.long, chunk, 0, 0) for chunk in sizes.chunks] + [(1, 0, *sizes.mixed)]
    found += [Cell("sync", False, *shape, steps=PREFILL_STEPS) for shape in shapes]
    return [cell for cell in found if cell.peak_tokens <= sizes.kv_tokens]


@app.command()
def measure(
    out: Annotated[Path, typer.Option(help="Folder for a JSON of each part; those already there are kept.")],
    device: Annotated[str, typer.Option(help="cuda, or cpu to try it out.")] = "cuda",
    sms: Annotated[str, typer.Option(help="Multiprocessors of each part, comma-separated; all without.")] = "",
    seconds: Annotated[int, typer.Option(help="Time for one part; then it is ended.")] = 180,
) -> None:
    """Measure parts of the device, a process for each."""
    with outcome():
        from calibration.device import prepare

        counts = parts_of(device, sms)
        prepare(device, "measure parts")
        out.mkdir(parents=True, exist_ok=True)
        failed = []
        for count in counts:
            path = out / f"c{count}.json"
            if path.exists():
                continue
            options = ["--out", str(path), "--device", device, "--sms", str(count), "--seconds", str(seconds)]
            if not _ended_well([sys.executable, "-m", "calibration.hardware.probe", "part", *options], seconds):
                failed.append(str(count))
        if failed:
            typer.echo(f"not measured: {', '.join(failed)}", err=True)
            raise typer.Exit(1)


def parts_of(device: str, sms: str) -> list[int]:
    """The numbers of multiprocessors that were asked for; without any, and on a CPU, 0: the whole device.

    Raises:
        InputError: they are no such numbers, or no such device.
    """
    if device not in SIZES:
        raise InputError("--device", "", device, one_of(list(SIZES)))
    if not sms:
        return [0]
    if device == "cpu":
        raise InputError("--sms", "", sms, "none: a CPU has no parts")
    counts = [int(text) if text.isascii() and text.isdecimal() else 0 for text in sms.split(",")]
    if min(counts) < 1 or len(set(counts)) < len(counts):
        raise InputError("--sms", "", sms, "different whole numbers above 0, comma-separated")
    return counts


def _ended_well(command: Sequence[str], seconds: int) -> bool:
    """Whether a command ended well; it ends itself in time, and is ended where it hangs."""
    try:
        return subprocess.run(command, timeout=seconds + 5, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


@app.command()
def part(
    out: Annotated[Path, typer.Option(help="The file to write, JSON.")],
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    sms: Annotated[int, typer.Option(help="Multiprocessors; 0: all.")] = 0,
    seconds: Annotated[int, typer.Option(help="Time; then this process is ended.")] = 180,
) -> None:
    """Measure one part in this process."""
    signal.alarm(seconds)  # the end of this process, whatever it then hangs in
    with outcome():
        from calibration.device import prepare
        from calibration.hardware.probe_timing import on_part

        parts_of(device, str(sms) if sms else "")
        prepare(device, "measure parts")
        write_json(out, on_part(SIZES[device], device, sms))
    signal.alarm(0)


if __name__ == "__main__":
    sys.exit(app())
