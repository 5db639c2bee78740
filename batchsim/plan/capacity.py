"""The replicas that a load needs at least, from a profile's costs alone: nothing is simulated.

A loop that is always busy spends on a request its share of the steps that compute its prompt and of those that generate
its tokens. The share is smallest with the best batch and the best mixture of prompts and decodes that the limits allow,
which a real run only comes near; so what follows is a lower bound, made safer by `SLACK`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf, sqrt
from typing import TYPE_CHECKING

import numpy as np

from batchsim.profile import DecodeCurve, Profile
from batchsim.scenario import num_kv_blocks
from batchsim.schedules import SAME_HOST, loop_name

if TYPE_CHECKING:
    from batchsim.scenario import Scenario
    from batchsim.workload import Requests

SLACK = 0.9  # of the load: costs vary, and a mean of a product is not the product of means
# Requests that may wait at the end without the queue being said to grow: twice what `batchsim.latency.unstable` allows.
_WAITING, _DEVIATIONS = 0.06, 4.0
_IN_HOST = ("schedule", "build_inputs", "copy_in", "copy_out", "record", "update")
_MIXTURES = 12


@dataclass(frozen=True, slots=True)
class Load:
    """What arrives, on average: requests, over how long, and of each its new prompt tokens, the (query, key) pairs of
    its prompt, its output tokens and the tokens that it has in the cache halfway."""

    requests: int
    span_ns: int
    variation: float
    prompt_tokens: float
    pairs: float
    output_tokens: float
    context: float

    @classmethod
    def of(cls, scenario: Scenario, requests: Requests) -> Load:
        prompt, output = requests.prompt_tokens.astype(np.float64), requests.output_tokens.astype(np.float64)
        count = len(requests)
        new = float(prompt.mean())
        if scenario.prefix_caching and requests.hash_tokens:
            shared = len(requests.hash_ids) - len(np.unique(requests.hash_ids))
            new = max(new - shared * requests.hash_tokens / count, 1.0)
        between = np.diff(requests.arrival_ns)
        return cls(
            requests=count,
            span_ns=int(requests.arrival_ns[-1] - requests.arrival_ns[0]),
            variation=max(float(between.std() / between.mean()), 1.0) if between.any() else 1.0,
            prompt_tokens=new,
            pairs=float((prompt**2).mean()) / 2 * (new / float(prompt.mean())) ** 2,
            output_tokens=float(output.mean()),
            context=float(prompt.mean() + output.mean() / 2),
        )


def least_replicas(scenario: Scenario, profile: Profile, schedule: str, load: Load, rate: float = 0.0) -> int:
    """So many replicas of `scenario` at least can serve `load` without a queue that grows, and `rate` requests/s.

    Requests that are still running or waiting when the last one has arrived need not be served by then.

    Raises:
        InputError: without a file; the weights do not fit the device.
    """
    rows = most_rows(scenario, profile, load)
    each_ns = request_ns(scenario, profile, schedule, load, rows) * SLACK
    asked = max(ceil(rate * each_ns / 1e9), 1)
    if not scenario.workload.open_loop or load.span_ns <= 0:
        return asked
    late = _WAITING * load.requests + _DEVIATIONS * load.variation * sqrt(load.requests)
    needed = (load.requests - late) * each_ns / (load.span_ns + rows * each_ns)
    return max(ceil(needed), asked)


def most_rows(scenario: Scenario, profile: Profile, load: Load) -> int:
    """Requests that may run at once: by max_num_seqs, and by what the KV cache holds of them."""
    tokens = num_kv_blocks(scenario, profile.device_memory_bytes) * scenario.block_size
    return max(min(scenario.max_num_seqs, int(tokens / load.context)), 1)


def request_ns(scenario: Scenario, profile: Profile, schedule: str, load: Load, most: int) -> float:
    """The least time that one request takes a loop that is always busy with at most `most` rows, nanoseconds."""
    machine = _Loop(scenario, profile, schedule, load)
    sizes = {1, most, *(curve.size for curve in profile.device.decode if curve.size < most)}
    decoded = max(load.output_tokens - 1, 0.0)  # the step that ends the prompt samples the first
    budget = scenario.max_num_batched_tokens
    best = inf
    # Every step is full of prompts, with as many decodes beside them as there are: these may be between the sizes.
    full = (load.prompt_tokens + decoded) / budget
    if (beside := decoded / full) <= most:
        few, part = int(beside), beside % 1
        best = full * ((1 - part) * machine.mixed_ns(few, full) + part * machine.mixed_ns(few + 1, full))
    for rows in sizes:
        step_ns = machine.decode_ns(rows)
        alone = load.prompt_tokens / budget  # the prompts' steps, as full as they may be
        best = min(best, alone * machine.mixed_ns(0, alone) + decoded / rows * step_ns)
        # Or decodes ride along with the prompts, in so many steps a request.
        least, largest = load.prompt_tokens / max(budget - rows, 1), decoded / rows
        if least > largest:
            continue
        for share in np.geomspace(least, largest, _MIXTURES):
            best = min(best, share * machine.mixed_ns(rows, float(share)) + (largest - share) * step_ns)
    return best


class _Loop:
    """Times of a busy loop's steps, nanoseconds; means, without copies and latencies."""

    def __init__(self, scenario: Scenario, profile: Profile, schedule: str, load: Load) -> None:
        self._overlapped = SAME_HOST.get(schedule, schedule) == "async" and profile.overlaps
        self._loop = profile.loops[loop_name(schedule, graphs=scenario.cuda_graphs)]
        self._profile, self._graphs, self._load = profile, scenario.cuda_graphs, load
        self._scale = 1 / scenario.host_speed
        device = profile.device
        self._decode_ratio = sum(device.decode_ratios) / len(device.decode_ratios)
        self._prefill_ratio = sum(device.prefill_ratios) / len(device.prefill_ratios)

    def decode_ns(self, rows: int) -> float:
        """A step of `rows` decoding rows."""
        device = self._profile.device
        curve = self._curve(rows)
        # Of rows that are fewer than were measured, the line between the points may go below all of them.
        forward = curve.at(max(rows * self._load.context, curve.kv_tokens[0] * 0.5)) + device.beyond_ns(rows)
        forward *= self._decode_ratio
        if not self._graphs:
            forward *= device.eager_factor
        launch = self._phase("launch", rows) if self._graphs else self._launches(curve.size)
        return self._step(forward, launch, rows, not self._graphs)

    def mixed_ns(self, rows: int, share: float) -> float:
        """A step with the prompt tokens of `1 / share` requests, and `rows` decoding rows beside them."""
        fit, load = self._profile.device.prefill, self._load
        tokens = load.prompt_tokens / share
        forward = fit.at(round(tokens + rows), round(load.pairs / share), 0, rows, round(rows * load.context))
        return self._step(forward * self._prefill_ratio, self._launches(rows), rows, True)

    def _step(self, forward: float, launch: float, rows: int, by_kernel: bool) -> float:
        host = sum(self._phase(name, rows) for name in _IN_HOST)
        if self._overlapped:
            return max(forward, host + launch)
        if not self._profile.overlaps:
            return host + forward
        return host + (max(forward, launch) if by_kernel else forward + launch)

    def _launches(self, rows: int) -> float:
        fit = self._loop.kernel_launch
        return self._profile.kernels.total(rows) * fit.mean_ns(0) * self._scale

    def _phase(self, name: str, rows: int) -> float:
        fit = self._loop.phases.get(name)
        return fit.mean_ns(rows) * self._scale if fit is not None else 0.0

    def _curve(self, rows: int) -> DecodeCurve:
        curves = self._profile.device.decode
        return next((curve for curve in curves if curve.size >= rows), curves[-1])
