"""What a user may write of the requests of dynamic batching: those of a serving loop, without an output."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from batchsim.fields import MAX_ENTRIES
from batchsim.workload_scenario import (
    MAX_TOKENS,
    Arrivals,
    Distribution,
    Empirical,
    TraceWorkload,
    length_of,
)

Tokens = Annotated[int, Field(ge=0, le=MAX_TOKENS)]


class TokensDistribution(Distribution):
    """A distribution of lengths, which may be 0."""

    min: Tokens = 0
    """What a smaller value becomes."""


class TokensValues(Empirical):
    """Lengths that occur, 0 perhaps among them, and how often."""

    values: Annotated[tuple[Tokens, ...], Field(strict=False, min_length=1, max_length=MAX_ENTRIES)]
    """Values to draw from."""


def _length(value: object) -> object:
    return length_of(value, 0, TokensDistribution, TokensValues)


class FixedRequests(Arrivals):
    """Equal requests."""

    kind: Literal["fixed"]
    """What the requests are: all equal."""
    input_len: Tokens = 1
    """Tokens of each request; of no matter where a request is an image."""


class RandomRequests(Arrivals):
    """Requests whose lengths are drawn."""

    kind: Literal["random"]
    """What the requests are: drawn."""
    input_len: Annotated[TokensDistribution | TokensValues | Tokens, BeforeValidator(_length)]
    """Tokens of a request: a number, a distribution of scipy.stats, or values to draw from; 0 is allowed."""


DynamicWorkload = Annotated[FixedRequests | RandomRequests | TraceWorkload, Field(discriminator="kind")]
