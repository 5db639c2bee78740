"""A service on a device, made ready for scenarios one after the other, and how fast its host is at the moment."""

from __future__ import annotations

from batchsim.dynamic_scenario import DynamicScenario
from batchsim.errors import InputError
from batchsim.model import SERVICES, EncoderShape
from batchsim.operations import HOST_PHASES
from batchsim.profile import Profile
from batchsim.workload import Requests
from calibration.device import prepare
from calibration.fit import split_outliers
from calibration.services.calibrate import run_drill
from calibration.services.cells import Cell, Drill
from calibration.services.server import Server
from calibration.services.service import Service

# The batches that tell the host's speed.
PROBE_SIZES = (2, 8, 16)


class Bench:
    """Kept from one scenario to the next as long as the service is the same."""

    def __init__(self, device: str) -> None:
        prepare(device, "validate")
        self.device = device
        self._service: Service | None = None
        self._servers: dict[bool, Server] = {}

    def server(self, scenario: DynamicScenario, profile: Profile, requests: Requests) -> Server:
        """A server that can run `scenario`: what it may have to launch has been launched before.

        Raises:
            InputError: batches larger than the profile's largest graph.
        """
        assert scenario.model is not None
        shape = SERVICES[scenario.model]
        sizes = [curve.size for curve in profile.device.decode]
        if scenario.max_batch_size > sizes[-1]:
            wanted = f"at most {sizes[-1]}, the largest batch that {profile.name} was measured with"
            raise InputError(None, "max_batch_size", str(scenario.max_batch_size), wanted)
        lengths = [1]
        if isinstance(shape, EncoderShape):
            buckets = range(scenario.length_bucket, shape.max_length + scenario.length_bucket, scenario.length_bucket)
            lengths = sorted({min(length, shape.max_length) for length in buckets})
        service = self._service
        if service is None or (service.shape, service.sizes, service.lengths) != (shape, sizes, lengths):
            self._servers, self._service = {}, None  # what they hold of the device is needed for the next
            service = self._service = Service(shape, device=self.device, sizes=sizes, lengths=lengths)
        used = {service.length(int(tokens)) for tokens in {*requests.prompt_tokens.tolist()}}
        service.warm_up(graphs=scenario.cuda_graphs, lengths=used)
        if scenario.cuda_graphs not in self._servers:
            self._servers[scenario.cuda_graphs] = Server(service, graphs=scenario.cuda_graphs)
        return self._servers[scenario.cuda_graphs]


def host_speed(server: Server, profile: Profile, schedule: str, *, graphs: bool, length: int) -> float:
    """Speed of this host at this moment, relative to the profile's, in one schedule's loop.

    What the profile expects of the host phases of a few small batches of `length` tokens, which come without rests and
    with, over what they take here and now. They are the same whatever the load to be predicted.
    """
    images = not server.service.network.splits_lengths
    sizes = [size for size in server.service.sizes if size in PROBE_SIZES]
    cells = [Cell(schedule, graphs, True, size, 0 if images else length) for size in sizes]
    busy = Cell(schedule, graphs, False, sizes[-1], cells[-1].length)
    loop = profile.loops[busy.loop]
    on_cpu = server.service.device.type != "cuda"

    launches = 1 if graphs else profile.kernels.total(0)

    def expected_ns(phase: str, cell: Cell) -> float:
        fit, count = loop.phases.get(phase), 1
        if fit is None:
            fit, count = loop.kernel_launch, launches
        return fit.mean_ns(cell.num_seqs, num_tokens=cell.num_tokens) * count

    durations = {}
    for cell in cells:
        curve = next(curve for curve in profile.device.decode if curve.size == cell.num_seqs)
        durations[cell.kind] = sum(expected_ns(phase, cell) for phase in HOST_PHASES) + curve.at(cell.num_tokens)
    expected = took = 0.0
    for drill in (Drill((busy,)), Drill(tuple(cells))):
        for cell, samples in run_drill(server, drill, 0, durations).items():
            for phase in HOST_PHASES:
                # On the CPU a launch computes the forward, which says nothing of the interpreter.
                if samples.get(phase) and phase != "wait" and not (phase == "launch" and on_cpu):
                    expected += expected_ns(phase, cell)
                    took += float(split_outliers(samples[phase])[0].mean())
    return expected / took
