"""Writes chat_trace.csv: a synthetic trace of a chat service, in the format of the Azure LLM inference traces.

    python scenarios/notebooks/make_chat_trace.py

No request in it is anybody's: arrivals are a Poisson process whose rate rises from 1.5 to 4.5 requests a second and
falls again, a day in 200 seconds; lengths are log-normal, with the medians that were reported for Azure's
conversations (1,020 tokens of context, 129 generated: Patel et al., "Splitwise", ISCA 2024, section III). The same
file at every run: https://github.com/Azure/AzurePublicDataset has the format, and real traces.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from math import exp, log, pi, sin
from pathlib import Path
from random import Random
from statistics import NormalDist

REQUESTS = 600
MEAN_RATE, SWING, PERIOD_S = 3.0, 0.5, 200.0  # requests a second; share of the mean; seconds from dawn to dawn
CONTEXT = (1020, 0.9, 8000)  # median, sigma of the logarithm, and the most, tokens
GENERATED = (129, 0.8, 1500)
START = datetime(2026, 1, 5, 9)  # noqa: DTZ001 (as in the format: no zone)

PATH = Path(__file__).with_name("chat_trace.csv")


def rows(seed: int = 0) -> Iterator[str]:
    """The lines of the file."""
    random = Random(seed)
    yield "TIMESTAMP,ContextTokens,GeneratedTokens"
    at_s, written = 0.0, 0
    while written < REQUESTS:
        # Thinning: candidates come at the highest rate, and as many are kept as the rate of the moment asks for.
        at_s -= log(1 - random.random()) / (MEAN_RATE * (1 + SWING))
        if random.random() * (1 + SWING) < 1 + SWING * sin(2 * pi * (at_s / PERIOD_S - 0.25)):
            time = (START + timedelta(seconds=at_s)).isoformat(" ", "microseconds")
            yield f"{time}0,{_tokens(random, *CONTEXT)},{_tokens(random, *GENERATED)}"
            written += 1


def _tokens(random: Random, median: int, sigma: float, most: int) -> int:
    drawn = median * exp(sigma * NormalDist().inv_cdf(1 - random.random()))
    return min(max(round(drawn), 1), most)


if __name__ == "__main__":
    PATH.write_text("".join(f"{row}\n" for row in rows()), encoding="utf-8")
