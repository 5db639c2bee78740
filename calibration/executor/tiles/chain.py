"""Chains of kernels with their tensors, run tile by tile under a compiled policy, and what to compare them with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from batchsim.errors import InputError
from batchsim.tiles.graph import Chain
from batchsim.tiles.policy import Policy
from calibration.executor.tiles.fixed import FixedLaunch
from calibration.executor.tiles.plan import Plan, Trace
from calibration.executor.tiles.sync import PARTIAL_UNIT, TICKET_WORDS


class Bound:
    """A chain under a policy, ready to be launched: eagerly or inside a graph's capture, on the current stream.

    Launches of one plan share its semaphores, so they must follow each other. Tensors keep their addresses.
    """

    def __init__(self, function: Any, operands: Sequence[Any], plan: Plan, constants: dict[str, Any]) -> None:
        self.plan = plan
        device = plan.state.device
        sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        head = (
            *operands, plan.tickets, plan.wait_step, plan.wait_semaphore, plan.wait_value, plan.state,
            plan.semaphores, plan.error, plan.partials, plan.arrivals, plan.trace_words,
        )  # fmt: skip
        lanes = 1 << max(32 * constants["num_warps"] - 1, plan.most_waits - 1).bit_length()
        constants = {
            "TICKET": TICKET_WORDS, "UNIT": PARTIAL_UNIT, "LANES": lanes, "CUDA": device.type == "cuda",
            "TRACE": plan.traced, **constants,
        }  # fmt: skip
        self._launches = [
            FixedLaunch(
                function, min(sms * blocks, last - first), (*head, first, last, plan.policy.semaphores, plan.limit),
                constants,
            )
            for first, last, blocks in plan.launches
        ]  # fmt: skip

    def launch(self) -> None:
        """Run the chain once. The first launch compiles, and belongs before a capture."""
        for launch in self._launches:
            launch()

    def capture(self) -> torch.cuda.CUDAGraph:
        """One run as a graph."""
        return captured(self.launch)

    def check(self) -> None:
        """Raise RunError if a tile has waited too long; see `Plan.check`."""
        self.plan.check()

    def trace(self) -> Trace:
        """Times of the last run, if the plan is traced."""
        return self.plan.trace()


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """What `run` launches, as a graph, after a run outside of it in which libraries choose and compile."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


class TileChain(ABC):
    """A chain's kernels over fixed tensors.

    `x` is the input; `written` the outputs of the kernels, the last of them the chain's; all else are weights.
    """

    chain: Chain
    x: Tensor
    written: tuple[Tensor, ...]

    @abstractmethod
    def bind(self, policy: Policy | Plan) -> Bound:
        """The chain under a policy of its graph, or under a plan that chains of the same shape share."""

    @abstractmethod
    def exact(self) -> Tensor:
        """The chain's output in float64, intermediates rounded to their type."""

    @abstractmethod
    def library(self) -> Tensor:
        """The chain's output by torch's own operations."""

    @property
    def out(self) -> Tensor:
        return self.written[-1]

    def poison(self, seed: int) -> None:
        """New random input; NaN wherever kernels write."""
        generator = torch.Generator(self.x.device).manual_seed(seed)
        self.x.copy_(torch.randn(self.x.shape, generator=generator, device=self.x.device))
        for tensor in self.written:
            tensor.fill_(torch.nan)

    def error(self, exact: Tensor | None = None) -> float:
        """Relative norm of the output's error; NaN if anything was left unwritten."""
        exact = self.exact() if exact is None else exact
        return float((self.out.double() - exact).norm() / exact.norm())

    def _plan(self, policy: Policy | Plan) -> Plan:
        plan = policy if isinstance(policy, Plan) else Plan(policy, str(self.x.device))
        given = plan.policy.chain
        if (given.kernels, given.dependences) != (self.chain.kernels, self.chain.dependences):
            raise InputError(None, "policy", f"one of {given.name}", "one of a chain with the same kernels")
        return plan


def random_tensor(shape: tuple[int, ...], scale: float, device: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal values of deviation `scale`, drawn on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)


def product_operands(
    a: Tensor, b: Tensor, c: Tensor, shape: Sequence[int], *, gated: bool = False
) -> tuple[TensorDescriptor, ...]:
    """Descriptors of `c` = `a` `b`^T as `products` takes them; without a rest the first part stands for it."""
    rows, rows_rest, cols, cols_rest, depth, *_ = shape
    out = cols // 2 if gated else cols
    weights, block = (b.view(2, -1, b.shape[1]), [2, out]) if gated else (b, [cols])

    def blocks(tensor: Tensor, *sizes: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(tensor, list(sizes))

    return (
        blocks(a, rows, depth), blocks(a, rows_rest or rows, depth),
        blocks(weights, *block, depth), blocks(weights, *([cols_rest] if cols_rest else block), depth),
        blocks(c, rows, out), blocks(c, rows_rest or rows, cols_rest or out),
    )  # fmt: skip
