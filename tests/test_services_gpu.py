"""The services and their server on a GPU: streams, graphs and slots change no answer."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from batchsim.batching.dynamic import DynamicBatch, DynamicBatcher, Requested
from batchsim.model import SERVICES
from batchsim.schedules import SCHEDULES
from calibration.services.server import ServedRun, Server
from calibration.services.service import Service

# Warnings of Triton and of torch's CUDA parts are not this project's.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

TOLERANCE = 0.04  # relative norm: bfloat16 through all layers
SIZES, LENGTHS = (1, 2, 4, 8), (64, 128)


@pytest.fixture(scope="module", params=["bert-base", "resnet-50"])
def service(request: pytest.FixtureRequest) -> Service:
    service = Service(SERVICES[request.param], device="cuda", sizes=SIZES, lengths=LENGTHS, seed=2)
    service.warm_up(graphs=False)
    service.warm_up(graphs=True)
    return service


def requests_of(count: int) -> list[Requested]:
    return [Requested(i, i * 150_000, 1 + 11 * i % 128) for i in range(count)]


def serve(service: Service, schedule: str, *, graphs: bool) -> tuple[dict[int, npt.NDArray[Any]], ServedRun]:
    server = Server(service, graphs=graphs, timed_steps=64)
    requests, answers = requests_of(60), {}

    def keep(batch: DynamicBatch, found: npt.NDArray[np.float32]) -> None:
        answers.update({request.id: answer for request, answer in zip(batch.requests, found, strict=True)})

    payloads = [server.payload(request.id, request.tokens) for request in requests]
    batcher = DynamicBatcher(requests, max_batch_size=8)
    run = server.run(SCHEDULES[schedule](), batcher, payloads, on_answers=keep)
    assert batcher.finished == 60 == len(answers)
    return answers, run


def off(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_answers_are_those_of_float32_on_the_cpu(service: Service) -> None:
    reference = Service(service.shape, device="cpu", sizes=SIZES, lengths=LENGTHS, seed=2)
    server = Server(service, graphs=True, timed_steps=64)
    expected = {}
    with torch.inference_mode():
        for request in requests_of(60):
            payload = server.payload(request.id, request.tokens)
            expected[request.id] = reference.network.forward(torch.from_numpy(payload[None].copy()))[0].numpy()
    for schedule, graphs in product(("sync", "async"), (False, True)):
        answers, _ = serve(service, schedule, graphs=graphs)
        errors = [off(answers[number], expected[number]) for number in expected]
        assert max(errors) < TOLERANCE, (schedule, graphs, max(errors))
        # Nobody was given another's answer.
        assert min(off(answers[number], expected[(number + 1) % 60]) for number in expected) > 2 * max(errors)


def test_a_graph_computes_what_its_launches_do(service: Service) -> None:
    answers = []
    for graph in (False, True):
        for slot in (0, 1):
            items = service.host_items(slot, 3, service.length(100))
            service.network.collate(items, [service.network.payload(number, 100) for number in range(3)])
            with torch.inference_mode():
                destination, source = service.copy_in(slot, 3, service.length(100))
                destination.copy_(source)
                service.forward(slot, 4, service.length(100), graph=graph)
                torch.cuda.synchronize()
                destination, source = service.copy_out(slot, 3)
                destination.copy_(source)
            begin, end, found = service.results(slot, 3)
            assert 0 < end - begin < 1_000_000_000
            answers.append(found.copy())
    for found in answers[1:]:
        assert off(found, answers[0]) < 1e-3


def test_device_spans_follow_one_another_and_lie_within_the_run(service: Service) -> None:
    for schedule in ("sync", "async"):
        _, run = serve(service, schedule, graphs=True)
        lanes = {lane: [s for s in run.spans if s.lane == lane] for lane in ("copy_in", "compute", "copy_out")}
        slack_ns = 50_000
        for spans in lanes.values():
            assert [span.step for span in spans] == list(range(len(run.batches)))
            assert all(a.end_ns <= b.start_ns + 2_000 for a, b in pairwise(spans))
            assert all(-slack_ns <= span.start_ns <= span.end_ns <= run.total_ns + slack_ns for span in spans)
        for copied, computed, returned in zip(*lanes.values(), strict=True):
            assert copied.end_ns <= computed.start_ns + slack_ns
            assert computed.end_ns <= returned.start_ns + slack_ns
