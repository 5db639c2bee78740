"""Running a program on the CUDA device, and reading from torch's allocator what it took."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from batchsim.batching.continuous import ContinuousBatcher, Request
from batchsim.memory.services import Service
from batchsim.memory.serving import Serving
from batchsim.memory.training import Training
from batchsim.schedules import SCHEDULES
from calibration.memory.points import Program

STEPS = 2
PROMPT, OUTPUT = 64, 4


@dataclass(frozen=True, slots=True)
class Taken:
    """What a program took at most, bytes: allocated, reserved by the allocator, and of the device beside it."""

    allocated: int
    reserved: int
    beside: int


def fresh() -> None:
    """Leave the allocator as a new process finds it: workspaces of matrix products are taken anew."""
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def beside() -> int:
    """Bytes of the device in use that the allocator has not reserved: context, kernels, libraries, graphs."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def run(program: Program, device: str = "cuda") -> object:
    """Build a program and run it long enough to have reached its peak; what it was built of."""
    match program:
        case Training():
            return _train(program, device)
        case Serving():
            return _serve(program, device)
        case Service():
            return _answer(program, device)


def measure(program: Program) -> Taken:
    """What a program takes, after others in the same process.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    fresh()
    kept, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    try:
        built = run(program)
        torch.cuda.synchronize()
        allocated, most = torch.cuda.max_memory_allocated() - kept, torch.cuda.max_memory_reserved() - reserved
        taken = Taken(allocated, most, beside())
        del built
    finally:
        fresh()
    return taken


def fits(program: Program, capacity: int) -> bool:
    """Whether a program runs on a device with `capacity` bytes, which the allocator takes care not to exceed."""
    fresh()
    with limited_to(capacity):
        try:
            run(program)
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            return False
        finally:
            fresh()
    return True


@contextmanager
def limited_to(capacity: int) -> Iterator[None]:
    """The allocator gives at most `capacity` bytes."""
    total = torch.cuda.mem_get_info()[1]
    # The fraction is cut to whole bytes; half a byte more keeps it from being one byte less.
    torch.cuda.set_per_process_memory_fraction(min(1.0, (capacity + 0.5) / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def edge(program_of: Callable[[int], Program], guess: int, capacity: int) -> int:
    """The largest batch that runs, found from a guess outwards; 0 if none does."""

    def fitting(batch: int) -> bool:
        return fits(program_of(batch), capacity)

    below, above, step = guess, guess + 1, 1
    while below > 0 and not fitting(below):
        above, below, step = below, max(0, below - step), 2 * step
    if above == guess + 1:
        step = 1
        while fitting(above):
            below, above, step = above, above + step, 2 * step
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if fitting(middle) else (below, middle)
    return below


def history(program: Program) -> list[tuple[str, int, int]]:
    """What the allocator did while a program ran: (action, address, bytes), in order."""
    fresh()
    torch.cuda.memory._record_memory_history("all", context=None, max_entries=1_000_000)
    try:
        run(program)
        torch.cuda.synchronize()
        snapshot: Any = torch.cuda.memory._snapshot()
    finally:
        torch.cuda.memory._record_memory_history(None)
        fresh()
    return [
        (entry["action"], entry["addr"], entry["size"]) for entry in snapshot["device_traces"][0] if "addr" in entry
    ]


def _train(program: Training, device: str) -> object:
    from calibration.training.trainer import Trainer, random_tokens

    trainer = Trainer(
        program.shape, device, precision=program.precision, optimizer=program.optimizer,
        checkpointing=program.checkpointing,
    )  # fmt: skip
    for _ in range(STEPS):
        trainer.step([
            random_tokens(program.micro_batch, program.sequence_length, program.shape.vocab_size, device, seed)
            for seed in range(program.accumulation_steps)
        ])  # fmt: skip
    return trainer


def _serve(program: Serving, device: str) -> object:
    from calibration.executor import build

    executor = build(
        program.shape, device, max_num_seqs=program.max_num_seqs, max_num_batched_tokens=program.max_num_batched_tokens,
        max_model_len=program.max_model_len, num_kv_blocks=program.num_kv_blocks, block_size=program.block_size,
        graphs=program.graphs,
    )  # fmt: skip
    length = min(PROMPT, program.max_model_len - OUTPUT - 1)
    fitting = program.num_kv_blocks // -(-(length + OUTPUT + 1) // program.block_size)
    batcher = ContinuousBatcher(
        [Request(i, length, OUTPUT) for i in range(min(program.max_num_seqs, fitting))],
        max_num_seqs=program.max_num_seqs, max_num_batched_tokens=program.max_num_batched_tokens,
        block_size=program.block_size, num_kv_blocks=program.num_kv_blocks,
    )  # fmt: skip
    executor.run(SCHEDULES["sync"](), batcher)
    return executor


def _answer(program: Service, device: str) -> object:
    from batchsim.batching.dynamic import DynamicBatcher, Requested
    from calibration.services.server import Server
    from calibration.services.service import Service as Built

    held = []
    for _ in range(program.instances):
        size = program.max_batch_size
        built = Built(program.shape, device=device, sizes=sorted({1, max(1, size // 2), size}), lengths=program.lengths)
        built.warm_up(graphs=program.graphs)
        server = Server(built, graphs=program.graphs, timed_steps=64)
        requests = [Requested(i, 0, program.lengths[-1], 0) for i in range(2 * size)]
        payloads = [server.payload(request.id, program.lengths[-1]) for request in requests]
        server.run(SCHEDULES["sync"](), DynamicBatcher(requests, max_batch_size=size, length_bucket=1), payloads)
        held.append(server)
    return held
