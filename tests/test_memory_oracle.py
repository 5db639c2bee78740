"""Tapes against what torch programs really take and give back, followed on the CPU."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from batchsim.memory import services, serving, training
from batchsim.memory.allocator import play
from batchsim.memory.overheads import CPU
from batchsim.memory.serving import Serving
from batchsim.memory.tape import Tape, Term
from batchsim.memory.training import Training
from batchsim.model import SERVICES, EncoderShape, ModelShape
from calibration.executor import Decoder
from calibration.memory.fit import fit_library
from calibration.memory.measure import run
from calibration.memory.points import read, tape_of, with_batch
from calibration.services.convnet import ConvNet
from calibration.services.encoder import Encoder
from calibration.training.trainer import Trainer, random_tokens
from tests.memory_trace import Traced, traced

POINTS = Path(__file__).parents[1] / "calibration" / "validation" / "memory" / "points.yaml"
# The gradient of the loss that torch starts with is divided by the number of micro-batches: one scalar more.
SCALARS = 8


class FusedNorm(torch.autograd.Function):
    """An RMSNorm that takes and keeps what torch's fused kernel does on a GPU; on the CPU torch composes it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, torch.empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.zeros_like(x), torch.zeros_like(weight)


@pytest.fixture(autouse=True)
def fused_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: nn.RMSNorm, x: Tensor) -> Any:
        return FusedNorm.apply(x, self.weight)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(nn.RMSNorm, "forward", forward)


def shape_of(kv_heads: int = 2, vocab: int = 1000, layers: int = 3, hidden: int = 64) -> ModelShape:
    return ModelShape("small", layers, hidden, 4, kv_heads, hidden // 4, 5 * hidden // 2, vocab)


def trace(program: Training) -> Tape:
    """The tape of a trainer that is built and does two steps."""
    mode = Traced()
    with mode:
        trainer = Trainer(
            program.shape, "cpu", precision=program.precision, optimizer=program.optimizer,
            checkpointing=program.checkpointing,
        )  # fmt: skip
        for _ in range(2):
            batch = [
                random_tokens(program.micro_batch, program.sequence_length, program.shape.vocab_size, "cpu")
                for _ in range(program.accumulation_steps)
            ]
            trainer.step(batch)
            del batch
        mode.settle()
    return mode.tape


def taken(tape: Tape) -> int:
    return sum(play(tape).terms.values())


@pytest.mark.parametrize(
    ("precision", "checkpointing", "optimizer", "steps", "kv_heads", "vocab"),
    [
        (*first, *second)
        for first, second in zip(
            product(("bf16", "mixed", "fp32"), ("none", "full"), ("sgd", "momentum", "adamw")),
            [(1, 4, 1000), (2, 2, 32), (3, 4, 32), (2, 4, 1000), (1, 2, 32)] * 4,
            strict=False,
        )
    ],
)
def test_peak_of_training_is_torchs_to_a_few_bytes(
    precision: training.Precision, checkpointing: training.Checkpointing, optimizer: training.Optimizer, steps: int,
    kv_heads: int, vocab: int,
) -> None:  # fmt: skip
    program = Training(shape_of(kv_heads, vocab), 32, 2, steps, optimizer, precision, checkpointing)
    assert 0 <= taken(trace(program)) - taken(training.tape(program)) <= SCALARS


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_peak_of_attention_that_is_composed(checkpointing: training.Checkpointing) -> None:
    library = CPU.model_copy(update={"composes_grouped_float": True})
    program = Training(shape_of(), 48, 2, 2, "sgd", "fp32", checkpointing, library)
    with sdpa_kernel(SDPBackend.MATH):
        assert 0 <= taken(trace(program)) - taken(training.tape(program)) <= SCALARS


@pytest.mark.parametrize(("precision", "checkpointing"), [("mixed", "none"), ("bf16", "full")])
def test_what_the_allocator_would_reserve(precision: training.Precision, checkpointing: training.Checkpointing) -> None:
    # Large enough for large segments; the order of allocations counts here, not only their sizes.
    program = Training(shape_of(4, 4000, 2, 256), 256, 8, 2, "momentum", precision, checkpointing)
    real, told = play(trace(program)), play(training.tape(program))
    assert told.allocated == pytest.approx(real.allocated, rel=0.001)
    assert told.reserved == pytest.approx(real.reserved, rel=0.02)


def test_saved_activations_are_what_autograd_saves() -> None:
    program = Training(shape_of(vocab=4000), 32, 2, 1, "sgd", "bf16")
    trainer = Trainer(program.shape, "cpu", precision="bf16", optimizer="sgd")
    weights = {weight.untyped_storage().data_ptr() for weight in trainer.model.parameters()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = random_tokens(2, 32, 4000, "cpu")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = trainer.forward(tokens)
    weights.add(tokens.untyped_storage().data_ptr())
    kept = sum(tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in weights)
    del loss
    told = play(training.tape(program)).terms
    parts: tuple[Term, ...] = ("residual stream", "norms", "attention", "MLP")
    rows, angles = 64, 2 * 32 * 16 * 2
    loss_bytes = rows * 4000 * 4 + rows * 8 + 4 * 2  # logarithms, targets, and two scalars
    # The residual stream behind the last norm is kept; each layer's inputs are, by the norms.
    assert kept == pytest.approx(sum(told[part] for part in parts) + angles + loss_bytes, rel=0.01)


def test_a_decoder_is_what_its_tape_says() -> None:
    shape = replace(shape_of(2, 512), dtype_bytes=4)
    decoder = Decoder(
        shape, device="cpu", dtype=torch.float32, seed=0, num_kv_blocks=40, max_num_seqs=5, max_num_batched_tokens=96,
        max_model_len=200,
    )  # fmt: skip
    found: dict[int, int] = {}

    def look(value: object) -> None:
        if isinstance(value, Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, list | tuple):
            for each in value:
                look(each)

    for holder in (decoder, decoder.buffers):
        for name, value in vars(holder).items():
            if not name.startswith(("_", "host")):
                look(value)
    assert taken(serving.tape(Serving(shape, 40, 5, 96, 200, graphs=False))) == sum(found.values())


@pytest.mark.parametrize(("name", "length"), [("tiny-encoder", 64), ("bert-base", 128), ("resnet-50", 1)])
def test_a_forward_is_what_its_tape_says(name: str, length: int) -> None:
    shape, rows = replace(SERVICES[name], dtype_bytes=4), 2
    network: Encoder | ConvNet
    if isinstance(shape, EncoderShape):
        network = Encoder(shape, device=torch.device("cpu"), dtype=torch.float32, seed=0)
    else:
        network = ConvNet(shape, device=torch.device("cpu"), dtype=torch.float32, seed=0)
    items = torch.ones(rows, network.item_size(length), dtype=network.item_type)
    weights: list[Tensor] = []

    def look(value: object) -> None:
        if isinstance(value, Tensor):
            weights.append(value)
        elif isinstance(value, list | tuple):
            for each in value:
                look(each)

    for value in vars(network).values():
        look(value)
    held = Tape()
    services.parameters(held, shape)
    assert taken(held) == sum(weight.untyped_storage().nbytes() for weight in weights)
    with torch.inference_mode():
        real = traced(lambda: network.forward(items), items, *weights)
    told = Tape()
    services.Device(told).forward(shape, rows, length)
    assert taken(told) == taken(real)


def test_programs_are_built_and_run() -> None:
    kinds = (
        Training(shape_of(), 16, 2, 2, "adamw", "mixed", "full"),
        Serving(replace(shape_of(), dtype_bytes=4), 40, 4, 64, 100, graphs=False),
        services.Service(SERVICES["tiny-encoder"], 6, (32, 64), graphs=False),
        services.Service(SERVICES["tiny-convnet"], 6, graphs=False),
    )
    for program in kinds:
        assert run(program, "cpu") is not None


def test_points_are_many_and_no_two_alike() -> None:
    points = read(POINTS)
    assert len({point.name for point in points}) == len(points)
    assert sum(point.capacity is None for point in points) >= 28
    for point in points:
        assert taken(tape_of(with_batch(point.program, point.batch), CPU)) == taken(tape_of(point.program, CPU))


def test_a_fit_recovers_what_kernels_take() -> None:
    def case(width: int, heads: int, kv_heads: int, length: int, kernel: str, extra: int) -> dict[str, Any]:
        sizes = {"sequences": 2, "length": length, "heads": heads, "kv_heads": kv_heads, "head_dim": 64}
        gradients = 2 * length * 64 * width * (heads + 2 * kv_heads)
        taken = [gradients + extra, gradients]
        return {**sizes, "width": width, "kernel": kernel, "forward": [0, 0], "backward": taken}

    def half(length: int, heads: int) -> dict[str, Any]:
        return case(
            2, heads, heads, length, "ScaledDotProductCudnnAttentionBackward0", 2 * length * heads * (64 * 4 + 8)
        )

    probes = {
        "provenance": {"device": "a GPU"}, "product_workspace": 32 << 20, "context": 1, "context_after": 700 << 20,
        "graphs": {"1": 2048, "1000": 2_048_000}, "rows": [],
        "attention": [*(half(length, heads) for length in (512, 1024) for heads in (8, 16)),
                      case(4, 8, 2, 512, "UnsafeViewBackward0", 123)],
    }  # fmt: skip
    # Of the same size of heads the two features are proportional; their sum is what can be told.
    library, lines = fit_library(probes, "some")
    kernel = library.attention(2, grouped=False)
    assert kernel.element * 64 + kernel.row == pytest.approx(64 * 4 + 8, abs=40)
    assert library.composes_grouped_float and library.context == 700 << 20 and library.graph_kernel == 2048
    assert any("composed" in line for line in lines)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "mixed"])
def test_a_small_model_on_the_device(precision: training.Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    from batchsim.memory.overheads import library_for
    from calibration.memory.measure import measure

    library = library_for(torch.cuda.get_device_name())
    program = Training(shape_of(4, 4000, 4, 512), 512, 8, 2, "adamw", precision, library=library)
    assert play(training.tape(program)).allocated == pytest.approx(measure(program).allocated, rel=0.05)
