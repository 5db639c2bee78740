"""The iteration level equals the operation level to the nanosecond: every token of every request, and every figure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchsim.batching.continuous import kv_blocks, max_tokens
from batchsim.costs import ProfileCosts
from batchsim.iteration.engine import FIRST_QUOTA, QUOTA, Iterations
from batchsim.operation import Limits, operate
from batchsim.profile import KernelCounts
from batchsim.router import ROUTERS
from batchsim.served import Served
from batchsim.workload import Requests
from tests.profiles import small_profile

# Few layers: a forward without graphs is told of kernel by kernel, which takes the operation level its time.
KERNELS = KernelCounts(first=1, layers=3, per_layer=9, last=4, split_rows=32)
PROFILE = small_profile(kernels=KERNELS)
# On a CPU a launch is the forward itself.
BLOCKING = small_profile(kernels=KERNELS, overlaps=False)


@dataclass(frozen=True)
class Case:
    """A workload, the batcher's limits, and the machine."""

    requests: Requests
    limits: Limits
    schedule: str = "sync"
    graphs: bool = True
    overlaps: bool = True
    jitter: bool = True
    host_speed: float = 1.0
    warm_up_ns: int = 0
    seed: int = 0

    def costs(self, replica: int = 0) -> ProfileCosts:
        return ProfileCosts(
            PROFILE if self.overlaps else BLOCKING, self.schedule, graphs=self.graphs, host_speed=self.host_speed,
            jitter=self.jitter, seed=self.seed, replica=replica,
        )  # fmt: skip


def requests_of(rows: list[tuple[int, int, int, int]], hashes: list[list[int]] | None = None, **how: Any) -> Requests:
    """Requests from (gap before it, prompt, output, priority)."""
    gaps, prompts, outputs, priorities = (np.array(column, np.int64) for column in zip(*rows, strict=True))
    ids = hashes or [[] for _ in rows]
    arguments: dict[str, Any] = {"closed": False, "max_concurrency": None, "dropped": 0} | how
    return Requests(
        arrival_ns=np.zeros_like(gaps) if arguments["closed"] else np.cumsum(gaps),
        prompt_tokens=prompts,
        output_tokens=outputs,
        priority=priorities,
        hash_starts=np.cumsum([0, *map(len, ids)]),
        hash_ids=np.array([number for each in ids for number in each], np.int64),
        hash_tokens=16 if hashes else 0,
        **arguments,
    )


def assert_equal_levels(case: Case) -> Served:
    costs = [case.costs(replica) for replica in range(case.limits.replicas)]
    told = operate(case.requests, costs, case.limits, case.schedule, warm_up_ns=case.warm_up_ns, token_times=True)
    served, totals, counts, tokens = told.served, told.totals, told.counts, told.token_times
    run = Iterations(
        case.requests, costs, case.limits, asynchronous=case.schedule == "async", warm_up_ns=case.warm_up_ns,
        token_times=True,
    )  # fmt: skip
    assert run.run()
    found = run.served()
    times: dict[int, list[int]] = {}
    for number, at in run.token_times().tolist():
        times.setdefault(number, []).append(at)
    assert times == tokens
    for name in (
        "arrival_ns",
        "started_ns",
        "first_token_ns",
        "finished_ns",
        "generated",
        "cached_tokens",
        "preemptions",
        "replica",
    ):
        np.testing.assert_array_equal(getattr(found, name), getattr(served, name), err_msg=name)
    assert pooled(found) == pooled(served)
    np.testing.assert_array_equal(np.trim_zeros(found.batch_sizes, "b"), np.trim_zeros(served.batch_sizes, "b"))
    if case.limits.replicas == 1:
        assert run.work["iterations"] == told.iterations
    for name in ("time_ns", "running", "waiting", "kv_blocks"):
        np.testing.assert_array_equal(getattr(found.series, name), getattr(served.series, name), err_msg=name)
    assert run.counts == counts
    ours, theirs = asdict(run.totals()), asdict(totals)
    for name in ours:
        if name == "steps_ns":
            np.testing.assert_array_equal(np.sort(ours[name]), np.sort(theirs[name]))
        elif isinstance(ours[name], dict):
            assert nonzero(ours[name]) == nonzero(theirs[name]), name
        else:
            assert ours[name] == theirs[name], name
    return found


def nonzero(entries: dict[str, int]) -> dict[str, int]:
    return {key: value for key, value in entries.items() if value}


def pooled(served: Served) -> dict[int, int]:
    gaps: dict[int, int] = {}
    for gap, count in zip(served.itl_ns.tolist(), served.itl_count.tolist(), strict=True):
        gaps[gap] = gaps.get(gap, 0) + count
    return gaps


LIMITS = Limits(max_num_seqs=4, max_num_batched_tokens=128, block_size=16, num_kv_blocks=None)


@pytest.mark.parametrize("schedule", ["sync", "async"])
def test_a_plain_run(schedule: str) -> None:
    assert_equal_levels(Case(requests_of([(0, 32, 20, 0)] * 6), LIMITS, schedule))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    block_size = draw(st.sampled_from([16, 32]))
    rows = draw(
        st.lists(
            st.tuples(
                st.sampled_from([0, 0, 1_000, 300_000, 3_000_000, 40_000_000]) | st.integers(0, 10_000_000),
                st.integers(1, 200) | st.sampled_from([16, 32, 64, 96, 128]), st.integers(1, 45), st.integers(0, 2),
            ),
            min_size=1, max_size=24,
        )
    )  # fmt: skip
    longest = max(kv_blocks(max_tokens(prompt, output), block_size) for _, prompt, output, _ in rows)
    max_num_seqs = draw(st.integers(1, 10))
    chunked = draw(st.booleans()) or draw(st.booleans())
    most = max(prompt + output for _, prompt, output, _ in rows)
    budget = draw(st.integers(max_num_seqs, 300)) if chunked else most + draw(st.integers(max_num_seqs, 100))
    caching = draw(st.booleans())
    hashes = None
    if caching:
        prefixes = draw(st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows)))
        shared = draw(st.integers(0, 12))
        hashes = [
            [1000 * (which + 1) + i if i < shared else 10_000 + 100 * number + i for i in range(-(-prompt // 16))]
            for number, (which, (_, prompt, _, _)) in enumerate(zip(prefixes, rows, strict=True))
        ]
    blocks = draw(st.none() | st.integers(longest, 3 * longest + 4)) if not caching else draw(
        st.integers(longest, 4 * longest + 8)
    )  # fmt: skip
    how: dict[str, Any] = {}
    if draw(st.integers(0, 3)) == 0:
        how = {"max_concurrency": draw(st.integers(1, 6)), "closed": draw(st.booleans())}
    replicas = 1 if how else draw(st.sampled_from([1, 1, 1, 2, 3]))
    limits = Limits(
        max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, block_size=block_size, num_kv_blocks=blocks,
        chunked_prefill=chunked, reserve=draw(st.integers(0, 3)) == 0, by_priority=draw(st.booleans()),
        prefix_caching=caching, replicas=replicas, router=draw(st.sampled_from(ROUTERS)),
    )  # fmt: skip
    return Case(
        requests_of(rows, hashes, **how), limits, draw(st.sampled_from(["sync", "async"])), draw(st.booleans()),
        draw(st.integers(0, 4)) > 0, draw(st.booleans()), draw(st.sampled_from([1.0, 0.1, 3.7])),
        draw(st.sampled_from([0, 0, 20_000_000])), draw(st.integers(0, 1000)),
    )  # fmt: skip


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_every_token_at_the_same_nanosecond(case: Case) -> None:
    assert_equal_levels(case)


@st.composite
def tight_cases(draw: st.DrawFn) -> Case:
    """Many short requests, some of which fill a block at the same step, and hardly more blocks than one needs."""
    rows = draw(
        st.lists(
            st.tuples(
                st.sampled_from([0, 0, 1_500_000, 3_000_000]), st.integers(10, 42), st.integers(20, 70),
                st.integers(0, 3),
            ),
            min_size=4, max_size=12,
        )
    )  # fmt: skip
    longest = max(kv_blocks(max_tokens(prompt, output), 16) for _, prompt, output, _ in rows)
    limits = Limits(
        max_num_seqs=draw(st.integers(3, 8)), max_num_batched_tokens=128, block_size=16,
        num_kv_blocks=draw(st.integers(longest, 3 * longest)), by_priority=draw(st.integers(0, 3)) > 0,
    )  # fmt: skip
    return Case(requests_of(rows), limits, draw(st.sampled_from(["sync", "async"])), jitter=draw(st.booleans()))


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(tight_cases())
def test_every_preemption_at_the_same_nanosecond(case: Case) -> None:
    assert_equal_levels(case)


@pytest.mark.parametrize("schedule", ["sync", "async"])
def test_a_run_that_outlasts_its_buffers(schedule: str) -> None:
    """More steps than draws are kept for at once, and requests that are preempted again and again."""
    numbers = np.random.default_rng(3)
    columns = [numbers.integers(low, high, 1500).tolist() for low, high in ((0, 2_000_000), (1, 60), (1, 300), (0, 3))]
    limits = Limits(max_num_seqs=40, max_num_batched_tokens=512, block_size=16, num_kv_blocks=200)
    found = assert_equal_levels(Case(requests_of(list(zip(*columns, strict=True))), limits, schedule))
    assert found.batch_sizes.sum() > FIRST_QUOTA + QUOTA
    assert found.preemptions.sum() > 1500
