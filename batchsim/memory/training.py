"""The tape of training: calibration/training/trainer.py, line by line, with tensors that have sizes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from batchsim.memory.attention import composed, fused
from batchsim.memory.autograd import Graph, Parameter, Storage, Tensor
from batchsim.memory.overheads import CPU, Library
from batchsim.memory.tape import Tape, Term
from batchsim.model import ModelShape

Optimizer = Literal["sgd", "momentum", "adamw"]
Precision = Literal["bf16", "mixed", "fp32"]
Checkpointing = Literal["none", "full"]

BFLOAT16, FLOAT32, INT64 = 2, 4, 8
# Bytes of (a weight, its gradient and its state; what matrix products and attention compute in).
WIDTHS: dict[Precision, tuple[int, int]] = {
    "bf16": (BFLOAT16, BFLOAT16), "mixed": (FLOAT32, BFLOAT16), "fp32": (FLOAT32, FLOAT32),
}  # fmt: skip
STATES: dict[Optimizer, int] = {"sgd": 0, "momentum": 1, "adamw": 2}
# Token rows from which the gradient of an embedding is summed in segments, and rows of a part of one
# (aten/src/ATen/native/cuda/Embedding.cu).
SORTED_ROWS, SEGMENT_ROWS = 3072, 10
ALIKE = 2  # micro-batches of a step after which all others take what the last one took


@dataclass(frozen=True, slots=True)
class Training:
    """One optimiser step's shape and settings; `accumulation_steps` micro-batches of `micro_batch` sequences."""

    shape: ModelShape
    sequence_length: int
    micro_batch: int
    accumulation_steps: int = 1
    optimizer: Optimizer = "adamw"
    precision: Precision = "mixed"
    checkpointing: Checkpointing = "none"
    library: Library = CPU


def tape(training: Training) -> Tape:
    """Building the model, and two optimiser steps: the first makes the optimiser's state, the second meets it."""
    trainer = _Trainer(training)
    for _ in range(2):
        trainer.step()
    return trainer.tape


def module(forward: Callable[..., Tensor], *inputs: object) -> Tensor:
    """As torch calls a module: its inputs are held until its result is there and its own variables are gone."""
    return forward(*inputs)


class _Layer:
    """One layer's weights, in the order in which torch makes them."""

    def __init__(self, make: _Trainer) -> None:
        shape = make.training.shape
        hidden, inner, head = shape.hidden_size, shape.intermediate_size, shape.head_dim
        self.attention_norm = make.parameter(hidden)
        self.query = make.parameter(hidden * shape.num_heads * head)
        self.key = make.parameter(hidden * shape.num_kv_heads * head)
        self.value = make.parameter(hidden * shape.num_kv_heads * head)
        self.output = make.parameter(hidden * shape.num_heads * head)
        self.mlp_norm = make.parameter(hidden)
        self.gate = make.parameter(hidden * inner)
        self.up = make.parameter(hidden * inner)
        self.down = make.parameter(hidden * inner)

    def __iter__(self) -> Iterator[Parameter]:
        return iter(vars(self).values())


class _Trainer:
    def __init__(self, training: Training) -> None:
        self.training, self.tape = training, Tape()
        self.graph = Graph(self.tape, training.library.product_workspace)
        self.rows = training.micro_batch * training.sequence_length
        self.width, self.compute = WIDTHS[training.precision]
        self._casts: dict[Parameter, Tensor] = {}
        self._states: list[Storage] = []
        shape = training.shape
        self.tape.phase("building")
        self.embedding = self.parameter(shape.vocab_size * shape.hidden_size)
        self.layers = [_Layer(self) for _ in range(shape.num_layers)]
        self.norm = self.parameter(shape.hidden_size)
        self.lm_head = self.parameter(shape.vocab_size * shape.hidden_size)
        self.parameters = [
            self.embedding,
            *(weight for layer in self.layers for weight in layer),
            self.norm,
            self.lm_head,
        ]
        if self.width != FLOAT32:
            for weight in self.parameters:
                weight.storage = self.take("parameters", weight.elements * self.width)

    def parameter(self, elements: int) -> Parameter:
        """A weight as torch makes it, in float32; a bfloat16 model is converted when all are there."""
        return Parameter(self.take("parameters", elements * FLOAT32), elements)

    def take(self, term: Term, size: int) -> Storage:
        return Storage(self.tape, term, size)

    def step(self) -> None:
        """One optimiser step."""
        steps, length = self.training.accumulation_steps, self.training.sequence_length
        tokens = [self.take("inputs", self.training.micro_batch * (length + 1) * INT64) for _ in range(steps)]
        losses = []
        for _ in tokens[:ALIKE]:
            self.tape.phase("forward")
            loss, part = self.forward()
            self.tape.phase("backward of the loss")
            self.graph.backward(loss, self.take("temporaries", FLOAT32))
            losses.append(part)
        self.tape.phase("optimiser step")
        if not self._states:
            for weight in self.parameters:
                self._states += [
                    self.take("optimiser state", weight.elements * self.width)
                    for _ in range(STATES[self.training.optimizer])
                ]
                if self.training.optimizer == "adamw":
                    self._states.append(self.take("optimiser state", FLOAT32))  # the step, counted on the device
        for weight in self.parameters:
            weight.grad = None

    def forward(self) -> tuple[Tensor, Storage]:
        """The loss of a micro-batch, and its value."""
        x = self.embed()
        cos, sin = self.rotary()
        for layer in self.layers:

            def run(x: Tensor, layer: _Layer = layer) -> Tensor:
                return self.layer(x, layer, cos, sin)

            x = self.graph.checkpoint(run, x, self._casts.clear) if self.training.checkpointing == "full" else run(x)
        logits = self.to_float(self.linear(self.normed(self.told(x), self.norm), self.lm_head, "norms", "logits"))
        found = self.cross_entropy(logits)
        self._casts.clear()
        return found

    def layer(self, x: Tensor, layer: _Layer, cos: Storage, sin: Storage) -> Tensor:
        x = self.added(x, module(self.attention, self.normed(x, layer.attention_norm), layer, cos, sin))
        return self.added(x, module(self.mlp, self.normed(x, layer.mlp_norm), layer))

    def attention(self, x: Tensor, layer: _Layer, cos: Storage, sin: Storage) -> Tensor:
        q, k, v = (self.linear(x, weight, "attention", "attention") for weight in (layer.query, layer.key, layer.value))
        q, k = self.rotated(q, cos, sin), self.rotated(k, cos, sin)
        y = self.attend(q, k, v)
        return self.linear(y, layer.output, "attention", "temporaries")

    def mlp(self, x: Tensor, layer: _Layer) -> Tensor:
        return self.linear(
            self.times(self.silu(self.linear(x, layer.gate, "MLP", "MLP")), self.linear(x, layer.up, "MLP", "MLP")),
            layer.down, "MLP", "temporaries",
        )  # fmt: skip

    def rotary(self) -> tuple[Storage, Storage]:
        elements = self.training.sequence_length * self.training.shape.head_dim
        angles = self.take("temporaries", elements * FLOAT32)
        cos, sin = (self.take("inputs", elements * self.compute) for _ in range(2))
        del angles
        return cos, sin

    def told(self, x: Tensor) -> Tensor:
        """`x`; when its gradient is there, the backward pass of the layers begins."""

        def backward(gradient: Storage) -> tuple[Storage]:
            self.tape.phase("backward of the layers")
            return (gradient,)

        return self.graph.result(x.storage, x.width, [x], backward)

    # What follows are torch's operations: what each returns, keeps for its gradients, and takes to make them.

    def embed(self) -> Tensor:
        rows, shape = self.rows, self.training.shape
        workspace = []
        if self.training.library.sorts_embeddings and rows > SORTED_ROWS:
            segments = rows // SEGMENT_ROWS + min(rows, shape.vocab_size)
            workspace = [*(rows * INT64,) * 5, segments * shape.hidden_size * FLOAT32]
        return self.graph.operation(
            "residual stream", rows * shape.hidden_size * self.width, self.width,
            [(self.embedding, "gradients", self.embedding.elements * self.width)], backward_workspace=workspace,
        )  # fmt: skip

    def linear(self, x: Tensor, weight: Parameter, of: Term, term: Term) -> Tensor:
        """`x`, which belongs to `of`, times a weight; under autocast, both cast."""
        matrix: Tensor | Parameter = weight
        if self.width != self.compute:
            matrix = self.cast_weight(weight)
        # Who calls holds its own tensor until the product is there.
        cast = x if x.width == self.compute else self.cast(x, self.compute, of)
        columns = weight.elements // (cast.size // self.rows // self.compute)
        gradients: Term = "gradients" if matrix is weight else "temporaries"
        return self.graph.operation(
            term, self.rows * columns * self.compute, self.compute,
            [(matrix, gradients, weight.elements * self.compute), (cast, "temporaries", cast.size)],
            kept=[cast.storage, matrix.storage], product=True,
        )  # fmt: skip

    def cast(self, x: Tensor, width: int, term: Term) -> Tensor:
        gradient: Term = "logits" if term == "logits" else "temporaries"
        return self.graph.operation(term, x.size // x.width * width, width, [(x, gradient, x.size)])

    def cast_weight(self, weight: Parameter) -> Tensor:
        """Cast when it is first read, and kept until autocast ends."""
        if weight not in self._casts:
            self._casts[weight] = self.graph.operation(
                "cached casts", weight.elements * self.compute, self.compute,
                [(weight, "gradients", weight.elements * self.width)],
            )  # fmt: skip
        return self._casts[weight]

    def to_float(self, x: Tensor) -> Tensor:
        return x if x.width == FLOAT32 else self.cast(x, FLOAT32, "logits")

    def normed(self, x: Tensor, weight: Parameter) -> Tensor:
        return self.graph.operation(
            "norms", x.size, x.width,
            [(x, "temporaries", x.size), (weight, "gradients", weight.elements * self.width)],
            kept=[x.storage, weight.storage], also=[self.rows * FLOAT32],
        )  # fmt: skip

    def added(self, x: Tensor, branch: Tensor, term: Term = "residual stream") -> Tensor:
        size = branch.size

        def backward(gradient: Storage) -> tuple[Storage, Storage]:
            return gradient, gradient if gradient.size == size else self.take("temporaries", size)

        return self.graph.result(self.take(term, x.size), x.width, [x, branch], backward)

    def silu(self, x: Tensor) -> Tensor:
        return self.graph.operation("MLP", x.size, x.width, [(x, "temporaries", x.size)], kept=[x.storage])

    def times(self, x: Tensor, y: Tensor) -> Tensor:
        sizes: list[tuple[Tensor | Parameter, Term, int]] = [(x, "temporaries", x.size), (y, "temporaries", y.size)]
        return self.graph.operation("MLP", x.size, x.width, sizes, kept=[x.storage, y.storage])

    def rotated(self, x: Tensor, cos: Storage, sin: Storage) -> Tensor:
        """x * cos + cat(-second half, first half) * sin."""
        size, width, graph = x.size, x.width, self.graph
        half_gradients: list[Storage] = []  # that of one half is a view of the other's, which therefore stays

        def joined(_: Storage) -> tuple[Storage]:
            whole = self.take("temporaries", size)
            half_gradients.clear()
            return (whole,)

        def negated(gradient: Storage) -> tuple[Storage]:
            half_gradients.append(gradient)
            return (self.take("temporaries", size // 2),)

        def times(x: Tensor, by: Storage) -> Tensor:
            return graph.operation("temporaries", size, width, [(x, "temporaries", size)], kept=[by])

        def turned(halves: Tensor) -> Tensor:
            half = graph.result(self.take("temporaries", size // 2), width, [halves], negated)
            return graph.result(self.take("temporaries", size), width, [half], lambda gradient: (gradient,))

        halves = graph.result(x.storage, width, [x], joined)
        return self.added(times(x, cos), times(turned(halves), sin), "attention")

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape, library = self.training.shape, self.training.library
        grouped = shape.num_heads != shape.num_kv_heads
        if grouped and q.width == FLOAT32 and library.composes_grouped_float:
            return composed(self.graph, q, k, v, self.training.sequence_length, shape.head_dim)
        return fused(self.graph, q, k, v, self.rows * shape.num_heads, library.attention(q.width, grouped))

    def cross_entropy(self, logits: Tensor) -> tuple[Tensor, Storage]:
        size = logits.size
        targets = self.take("inputs", self.rows * INT64)
        likely = self.graph.operation("logits", size, FLOAT32, [(logits, "logits", size)], keeps_result=True)
        loss = self.graph.operation(
            "temporaries", FLOAT32, FLOAT32, [(likely, "logits", size)], kept=[likely.storage, targets], also=[FLOAT32]
        )
        part = self.graph.operation("temporaries", FLOAT32, FLOAT32, [(loss, "temporaries", FLOAT32)])
        return part, part.storage
