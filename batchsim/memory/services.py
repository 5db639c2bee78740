"""The tapes of an encoder's and a convnet's forward: the tensors of calibration/services, in the order of their lives.

A tensor lives as long as the program has a name for it, which may be longer than it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

from batchsim.memory.overheads import CPU, Library
from batchsim.memory.tape import GRAPHS, MAIN, Pool, Tape
from batchsim.model import ConvNetShape, EncoderShape

FLOAT32, INT64 = 4, 8
TOKEN_ID, PIXEL = 4, 1  # bytes of what a request's item is made of
SLOTS, STAMPS = 2, 2
CAPTURE = "capture"  # the stream on which torch captures all graphs of a process
# Of products to which a bias is added, which cuBLASLt does (ATen/cuda/CUDABlas.cpp, 1024 KiB without its variable).
BIAS_WORKSPACE = 1 << 20
STEM = 7  # rows and columns of the first convolution's weights


@dataclass(frozen=True, slots=True)
class Service:
    """Networks with room for batches of up to `max_batch_size` requests, padded to one of `lengths` tokens."""

    shape: EncoderShape | ConvNetShape
    max_batch_size: int
    lengths: tuple[int, ...] = (1,)
    graphs: bool = True
    instances: int = 1
    library: Library = CPU

    @property
    def sizes(self) -> list[int]:
        """Rows that batches are padded to: one, half and all, largest first."""
        return sorted({1, max(1, self.max_batch_size // 2), self.max_batch_size}, reverse=True)


def tape(service: Service) -> Tape:
    """Building each instance, running and capturing every batch of every length, and then the run.

    What a run computes without graphs, it computes on another stream than the warm-up: no block of the one is of use to
    the other.
    """
    device = Device(Tape(), service.library)
    device.tape.phase("serving")
    for instance in range(service.instances):
        _serve(device, service, instance)
    return device.tape


def _serve(device: Device, service: Service, instance: int) -> None:
    shape, rows, found = service.shape, service.max_batch_size, device.tape
    if isinstance(shape, EncoderShape):
        lengths, item, answer = sorted(service.lengths), max(service.lengths) * TOKEN_ID, shape.hidden_size
    else:
        lengths, item, answer = list(service.lengths[:1]), 3 * shape.image_size**2 * PIXEL, shape.num_classes
    parameters(found, shape)
    for _ in range(SLOTS):
        found.new("inputs", rows * item)
    for _ in range(SLOTS):
        found.new("inputs", (STAMPS + -(-rows * answer // 2)) * INT64)
    for length, size in [*product(lengths, service.sizes)] * SLOTS:
        device.forward(shape, size, length)
        if service.graphs:
            found.empty_cache()
            device.forward(shape, size, length, CAPTURE, f"{GRAPHS} {instance}")
    if not service.graphs:
        for _ in range(SLOTS):
            device.forward(shape, rows, lengths[-1], f"run {instance}")


def parameters(tape: Tape, shape: EncoderShape | ConvNetShape) -> None:
    """The weights as they are kept on the device, batch norms folded into the convolutions before them."""
    size = shape.dtype_bytes
    if isinstance(shape, EncoderShape):
        for elements in _encoder_weights(shape):
            tape.new("parameters", elements * size)
        return
    for elements, bias, columns in _convolutions(shape):
        weight = tape.new("parameters", elements * size)
        tape.new("parameters", bias * size)
        if columns > 1:  # a copy that has its channels last, which those of one column and row have as they are
            tape.new("parameters", elements * size)
            tape.free(weight)
    for elements in (4 * (shape.width << len(shape.depths) - 1) * shape.num_classes, shape.num_classes, 3, 3):
        tape.new("parameters", elements * size)


def _encoder_weights(shape: EncoderShape) -> list[int]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    affine = ((3 * hidden, hidden), (hidden, hidden), (1, hidden), (inner, hidden), (hidden, inner), (1, hidden))
    layer = [each for rows, columns in affine for each in (rows * columns, hidden if rows == 1 else rows)]
    return [shape.vocab_size * hidden, shape.max_length * hidden, hidden, hidden, *layer * shape.num_layers]


def _convolutions(shape: ConvNetShape) -> Iterator[tuple[int, int, int]]:
    """(elements of the weight, of the bias, columns of the kernel) of each."""

    def convolution(into: int, out: int, kernel: int) -> tuple[int, int, int]:
        return into * out * kernel**2, out, kernel

    yield convolution(3, shape.width, STEM)
    channels = shape.width
    for stage, depth in enumerate(shape.depths):
        inner = shape.width << stage
        for block in range(depth):
            yield convolution(channels, inner, 1)
            yield convolution(inner, inner, 3)
            yield convolution(inner, 4 * inner, 1)
            if block == 0:
                yield convolution(channels, 4 * inner, 1)
            channels = 4 * inner


@dataclass(slots=True)
class Device:
    """Where forwards run: a stream that multiplies matrices takes workspaces, behind its first result, and keeps them.

    Graphs' workspaces are of the pool that was captured to first.
    """

    tape: Tape
    library: Library = CPU
    pool: Pool = MAIN
    _multiplied: set[str] = field(default_factory=set)

    def forward(
        self, shape: EncoderShape | ConvNetShape, rows: int, length: int, stream: str = MAIN, pool: Pool = ""
    ) -> None:
        """One forward of `rows` requests, padded to `length` tokens, and its answer given back."""
        self.pool = pool or stream
        if isinstance(shape, EncoderShape):
            answer = _encode(self, shape, rows, length, stream)
        else:
            answer = _convolve(self, shape, rows, stream)
        self.tape.free(answer)

    def new(self, size: int) -> int:
        return self.tape.new("activations", size, self.pool)

    def multiplied(self, stream: str) -> None:
        """A product was made on `stream`, and a bias added to it."""
        if self.library.product_workspace and stream not in self._multiplied:
            self._multiplied.add(stream)
            for size in (self.library.product_workspace, BIAS_WORKSPACE):
                self.tape.new("workspace", size, self.pool)


def _encode(device: Device, shape: EncoderShape, rows: int, length: int, stream: str) -> int:
    tokens, hidden, inner, size, tape = (
        rows * length,
        shape.hidden_size,
        shape.intermediate_size,
        shape.dtype_bytes,
        device.tape,
    )

    def new(elements: int, width: int = size) -> int:
        return device.new(elements * width)

    def norm(x: int) -> int:
        found = [new(tokens * hidden), new(tokens, FLOAT32), new(tokens, FLOAT32)]  # with means and deviations
        tape.free(x, *found[1:])
        return found[0]

    def added(other: int) -> int:
        """The sum of what stays and of `other`, which goes."""
        found = new(tokens * hidden)
        tape.free(other)
        return found

    mask = new(tokens)
    padding = new(tokens, 1)
    tape.free(padding)
    embedded = new(tokens * hidden)
    x = norm(added(embedded))
    qkv = attended = 0
    for _ in range(shape.num_layers):
        fresh = new(3 * tokens * hidden)
        device.multiplied(stream)
        tape.free(qkv)
        qkv, fresh = fresh, new(tokens * hidden)
        tape.free(attended)
        attended = fresh
        total = added(new(tokens * hidden))
        fresh = norm(total)
        tape.free(x)
        x, up = fresh, new(tokens * inner)
        active = new(tokens * inner)
        tape.free(up)
        down = new(tokens * hidden)
        tape.free(active)
        fresh = norm(added(down))
        tape.free(x)
        x = fresh
    tape.free(mask, qkv, attended)
    return x


def _convolve(device: Device, shape: ConvNetShape, rows: int, stream: str) -> int:
    size, side, tape = shape.dtype_bytes, shape.image_size, device.tape

    def new(channels: int, side: int, width: int = size) -> int:
        return device.new(rows * channels * side * side * width)

    pixels = new(3, side)
    normal = new(3, side)
    half = -(-side // 2)
    stem = new(shape.width, half)
    if device.library.pads_channels:
        # Images and weights are copied so that they have a number of channels that the kernel takes.
        tape.free(device.new((rows * side**2 + shape.width * STEM**2) * device.library.pads_channels * size))
    side = -(-half // 2)
    x, indices = new(shape.width, side), new(shape.width, side, INT64)
    tape.free(indices, stem, normal)
    for stage, depth in enumerate(shape.depths):
        channels = shape.width << stage
        for block in range(depth):
            reduced = new(channels, side)
            side = -(-side // 2) if stage and not block else side
            spatial = new(channels, side)
            tape.free(reduced)
            expanded = new(4 * channels, side)
            tape.free(spatial)
            shortcut = 0 if block else new(4 * channels, side)
            tape.free(shortcut, x)
            x = expanded
    means = new(4 * channels, 1)
    answer = new(shape.num_classes, 1)
    device.multiplied(stream)
    tape.free(means, pixels, x)
    return answer
