"""The services against plain references, and that no request's answer depends on how it was batched; on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn import functional as f

from batchsim.batching.dynamic import DynamicBatch, DynamicBatcher, Requested
from batchsim.model import SERVICES, ConvNetShape, EncoderShape
from batchsim.schedules import SCHEDULES
from calibration.services.convnet import EPS, PIXEL_MEAN, PIXEL_STD, ConvNet, Convolution, Weights
from calibration.services.encoder import EPS as NORM_EPS
from calibration.services.encoder import Affine, Encoder
from calibration.services.server import Server
from calibration.services.service import Service

MS = 1_000_000
CPU = torch.device("cpu")
MODELS = ("tiny-encoder", "tiny-convnet")
Answers = dict[int, npt.NDArray[np.float32]]


def encoder(dtype: torch.dtype = torch.float64) -> Encoder:
    shape = SERVICES["tiny-encoder"]
    assert isinstance(shape, EncoderShape)
    return Encoder(shape, device=CPU, dtype=dtype, seed=3)


def convnet(dtype: torch.dtype = torch.float64) -> ConvNet:
    shape = SERVICES["tiny-convnet"]
    assert isinstance(shape, ConvNetShape)
    return ConvNet(shape, device=CPU, dtype=dtype, seed=3)


@pytest.fixture(scope="module", params=MODELS)
def service(request: pytest.FixtureRequest) -> Service:
    return Service(SERVICES[request.param], device="cpu", sizes=(1, 2, 4, 8), lengths=(16, 32, 64), seed=1)


def alone(service: Service, payload: npt.NDArray[Any], tokens: int) -> npt.NDArray[np.float32]:
    """The answer to one request, computed without any buffer, batch or padding."""
    items = torch.from_numpy(payload[None].copy())
    if not tokens and service.network.splits_lengths:
        items = torch.zeros(1, 1, dtype=torch.int32)
    with torch.inference_mode():
        answer: npt.NDArray[np.float32] = service.network.forward(items)[0].numpy()
    return answer


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_network_has_the_parameters_of_its_shape(name: str) -> None:
    assert Service(SERVICES[name], device="cpu", sizes=(1,)).network.parameters == SERVICES[name].parameters


def reference_encoding(network: Encoder, tokens: list[int]) -> Tensor:
    """Head by head, in formulas."""
    shape = network.shape

    def norm(x: Tensor, affine: Affine) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        deviation = torch.sqrt(centred.square().mean(-1, keepdim=True) + NORM_EPS)
        return centred / deviation * affine.weight + affine.bias

    def dense(x: Tensor, affine: Affine) -> Tensor:
        return x @ affine.weight.T + affine.bias

    x = norm(network.tokens[tokens] + network.positions[: len(tokens)], network.norm)
    for layer in network.layers:
        q, k, v = dense(x, layer.qkv).chunk(3, -1)
        heads = []
        for one in range(shape.num_heads):
            part = slice(one * shape.hidden_size // shape.num_heads, (one + 1) * shape.hidden_size // shape.num_heads)
            scores = q[:, part] @ k[:, part].T / math.sqrt(shape.hidden_size / shape.num_heads)
            heads.append(torch.softmax(scores, -1) @ v[:, part])
        x = norm(x + dense(torch.cat(heads, -1), layer.output), layer.attention_norm)
        inner = dense(x, layer.up)
        inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        x = norm(x + dense(inner, layer.down), layer.mlp_norm)
    return x[0]


def test_the_encoder_is_a_bert() -> None:
    network = encoder()
    for tokens in ([7], [3, 500, 21, 4], list(range(1, 40))):
        found = network.forward(torch.tensor([tokens], dtype=torch.int32))[0]
        torch.testing.assert_close(found, reference_encoding(network, tokens), rtol=1e-9, atol=1e-9)


def test_the_convnet_is_a_resnet() -> None:
    """Convolution and batch norm apart, torch's own, and the pixels normalised as they come."""
    network = convnet()
    weights = Weights.random(network.shape, 3)

    def normed(x: Tensor, c: Convolution) -> Tensor:
        weight, gamma, beta, mean, var = (t.double() for t in c[:5])
        x = f.conv2d(x, weight, stride=c.stride, padding=weight.shape[-1] // 2)
        return f.batch_norm(x, mean, var, gamma, beta, eps=EPS)

    size = network.shape.image_size
    pixels = np.stack([network.payload(number, 0) for number in range(3)])
    images = torch.from_numpy(pixels).view(-1, size, size, 3).permute(0, 3, 1, 2).double()
    x = (images - torch.tensor(PIXEL_MEAN).view(3, 1, 1)) / torch.tensor(PIXEL_STD).view(3, 1, 1)
    x = f.max_pool2d(f.relu(normed(x, weights.stem)), 3, 2, 1)
    for block in weights.blocks:
        inner = normed(f.relu(normed(f.relu(normed(x, block.reduce)), block.spatial)), block.expand)
        x = f.relu(inner + (x if block.project is None else normed(x, block.project)))
    expected = x.mean((2, 3)) @ weights.classifier.double().T + weights.bias.double()
    found = network.forward(torch.from_numpy(pixels))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # scale and shift are float32 before
    assert (found[0] - found[1]).norm() > 0.05 * found[0].norm()  # answers tell the images apart


def test_padding_changes_no_answer() -> None:
    network = encoder()
    payloads = [network.payload(number, length) for number, length in enumerate((5, 16, 1, 0))]
    answers = []
    for length in (16, 32, 128):
        items = np.full((4, length), 99, np.int32)
        network.collate(items, payloads)
        answers.append(network.forward(torch.from_numpy(items)))
    for found in answers[1:]:
        torch.testing.assert_close(found, answers[0], rtol=1e-9, atol=1e-9)
    single = network.forward(torch.from_numpy(payloads[0][None]))
    torch.testing.assert_close(answers[0][:1], single, rtol=1e-9, atol=1e-9)


def serve(
    service: Service, schedule: str, requests: list[Requested], **options: Any
) -> tuple[Answers, DynamicBatcher, list[DynamicBatch]]:
    server = Server(service, graphs=False)
    answers: Answers = {}

    def keep(batch: DynamicBatch, found: npt.NDArray[np.float32]) -> None:
        for request, answer in zip(batch.requests, found, strict=True):
            assert request.id not in answers
            answers[request.id] = answer

    batcher = DynamicBatcher(requests, length_bucket=16, **options)
    payloads = [server.payload(request.id, request.tokens) for request in requests]
    run = server.run(SCHEDULES[schedule](), batcher, payloads, on_answers=keep)
    host = [span for span in run.spans if span.lane == "host"]
    assert host[0].start_ns == 0 and host[-1].end_ns == run.total_ns
    assert all(before.end_ns == after.start_ns for before, after in pairwise(host))
    return answers, batcher, run.batches


def burst(
    count: int, spacing_ns: int = 0, *, lengths: Callable[[int], int] = lambda i: (7 * i) % 60
) -> list[Requested]:
    return [Requested(i, i * spacing_ns, lengths(i), i % 3) for i in range(count)]


@pytest.mark.parametrize("schedule", ["sync", "async"])
@pytest.mark.parametrize(
    ("spacing_ns", "options"),
    [
        (0, {"max_batch_size": 8}),
        (0, {"max_batch_size": 5}),
        (300_000, {"max_batch_size": 8, "max_queue_delay_ns": 2 * MS}),
        (200_000, {"max_batch_size": 8, "max_queue_delay_ns": MS, "preferred_batch_sizes": (3, 6)}),
        (0, {"max_batch_size": 1}),
    ],
)
def test_answers_are_those_of_each_request_alone(
    service: Service, schedule: str, spacing_ns: int, options: dict[str, Any]
) -> None:
    requests = burst(41, spacing_ns)
    answers, batcher, batches = serve(service, schedule, requests, **options)
    assert sorted(answers) == list(range(41))
    assert batcher.outcomes == {"arrivals": 41, "accepted": 41, "refused": 0, "dropped": 0, "served_late": 0}
    assert max(batch.num_seqs for batch in batches) <= options["max_batch_size"]
    server = Server(service, graphs=False)
    for request in requests:
        expected = alone(service, server.payload(request.id, request.tokens), request.tokens)
        np.testing.assert_allclose(answers[request.id], expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("schedule", ["sync", "async"])
@pytest.mark.parametrize("late", ["drop", "serve"])
def test_an_overload_loses_no_request(service: Service, schedule: str, late: str) -> None:
    """Far more than can be served: some are refused, some late, and all are counted; those served have answers."""
    requests = burst(300, 20_000)
    answers, batcher, batches = serve(
        service, schedule, requests, max_batch_size=4, max_queue_size=8, queue_timeout_ns=MS // 2, late=late
    )
    outcomes = batcher.outcomes
    assert outcomes["arrivals"] == 300 == sum(count for name, count in outcomes.items() if name != "arrivals")
    assert outcomes["refused"] > 0
    assert outcomes["dropped" if late == "drop" else "served_late"] > 0
    assert len(answers) == outcomes["accepted"] + outcomes["served_late"] == sum(b.num_seqs for b in batches)


def test_a_batch_of_two_slots_in_flight_overwrites_nothing(service: Service) -> None:
    """In the asynchronous schedule both slots are used in turn, and answers still are those of their own requests."""
    answers, _, batches = serve(service, "async", burst(16, lengths=lambda _: 32), max_batch_size=4)
    assert len(batches) == 4
    swapped = [np.allclose(answers[a], answers[b]) for a in answers for b in answers if a < b]
    assert not any(swapped)


def test_a_request_longer_than_the_model_takes_is_refused() -> None:
    with pytest.raises(ValueError, match="takes up to 128 tokens, not 256"):
        Service(SERVICES["tiny-encoder"], device="cpu", sizes=(1,), lengths=(256,))
