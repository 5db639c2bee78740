"""Which of several replicas serves a request.

- `round_robin`: each in turn;
- `least_outstanding`: the one with the fewest requests that are not finished, the first of several;
- `prefix_aware`: the one that has most of the prompt cached, if that is a good part of it and the loads are not too far
  apart; else the one with the fewest. SGLang's router decides so, with thresholds of this kind
  (`--cache-threshold`, `--balance-abs-threshold`, `--balance-rel-threshold`).
"""

from __future__ import annotations

from collections.abc import Sequence

from batchsim.batching.continuous import ContinuousBatcher, Request

ROUTERS = ("round_robin", "least_outstanding", "prefix_aware")
# The share of a prompt that has to be cached; how far apart loads may be: by so many requests, and by this factor.
CACHED_SHARE, BALANCE_REQUESTS, BALANCE_FACTOR = 0.3, 64, 1.5


def choose(router: str, batchers: Sequence[ContinuousBatcher], request: Request) -> int:
    """The replica for a request that arrives now, by a router that looks at them."""
    outstanding = [batcher.unserved for batcher in batchers]
    fewest, most = min(outstanding), max(outstanding)
    least = outstanding.index(fewest)
    if router == "least_outstanding" or (most - fewest > BALANCE_REQUESTS and most > BALANCE_FACTOR * fewest):
        return least
    size = batchers[0].block_size
    keys = request.hashes[: (request.prompt_tokens - 1) // size]
    cached = [len(batcher.pool.cached(keys)) for batcher in batchers]
    longest = max(cached)
    return cached.index(longest) if longest and longest * size >= CACHED_SHARE * request.prompt_tokens else least
