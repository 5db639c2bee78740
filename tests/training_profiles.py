"""A training profile that tests write down: round figures, in proportion to what a GPU shows."""

from __future__ import annotations

from typing import Any

from batchsim.training_profile import Curve, HostFit, Launches, OptimizerFit, PrecisionFit, TokenFit, TrainingProfile
from batchsim.training_scenario import TrainingScenario

LAYERS = 4
HOST_NS = {"layers": 1_200_000, "head": 100_000, "head_backward": 120_000, "layers_backward": 1_600_000}
COUNTS = {"layers": 200, "head": 10, "head_backward": 10, "layers_backward": 400}
TOKEN_NS = {"layers": 800, "head": 200, "head_backward": 400, "layers_backward": 1_600}
ACCUMULATE_NS = {"head_backward": 50_000, "layers_backward": 200_000}
OPTIMIZER_NS, OPTIMIZER_HOST_NS, ZERO_GRAD_NS = 900_000, 500_000, 60_000
SEQUENCE_NS, COPY_NS = 7_000, 9_000


def host(ns: float, later_ns: float = 0.0, ratios: tuple[float, ...] = (1.0,)) -> HostFit:
    return HostFit(ns=ns, later_ns=later_ns, ratios=list(ratios))


def part(name: str, ratios: tuple[float, ...], times: float = 1.0) -> Launches:
    later = COUNTS[name] + 36 if name == "layers_backward" else COUNTS[name]
    return Launches(
        first=COUNTS[name],
        later=later,
        host=host(HOST_NS[name] * times, 80_000 if name == "layers_backward" else 0, ratios),
    )


def small_training_profile(ratios: tuple[float, ...] = (0.9, 1.0, 1.1), **changes: Any) -> TrainingProfile:
    """Times that are proportional to tokens, for `tiny`; `ratios` of the host's times."""
    fit = PrecisionFit(
        host={
            "none": {name: part(name, ratios) for name in HOST_NS},
            "full": {name: part(name, ratios, 1.5 if name == "layers_backward" else 1.0) for name in HOST_NS},
        },
        device={
            name: Curve(tokens=[0, 1 << 20], ns=[0.0, float(ns << 20)], sequence_length=[0, 4096], token_ns=[0.0, 0.0])
            for name, ns in TOKEN_NS.items()
        },
        recompute=1.0,
        accumulate_ns=dict(ACCUMULATE_NS),
        optimizers={
            "adamw": OptimizerFit(
                launches=12, host=host(OPTIMIZER_HOST_NS), zero_grad=host(ZERO_GRAD_NS), device_ns=OPTIMIZER_NS
            )
        },
        residuals={},
    )
    fields: dict[str, Any] = {
        "schema_version": 1,
        "kind": "training_profile",
        "name": "small",
        "model": "tiny",
        "provenance": {"device": "none"},
        "device_memory_bytes": 1 << 34,
        "overlaps": True,
        "layers": LAYERS,
        "prepare": TokenFit(call_ns=0, sequence_ns=SEQUENCE_NS),
        "copy_in_device": TokenFit(call_ns=COPY_NS),
        "calls": {"copy_in": host(11_000), "record": host(4_000), "stream_wait": host(3_000), "read_loss": host(2_000)},
        "round_trip_ns": 20_000,
        "precisions": {"mixed": fit},
        "cells": [],
    }
    return TrainingProfile(**fields | changes)


def training(**changes: Any) -> TrainingScenario:
    """Five optimiser steps of 16 sequences of 128 tokens, four at a time."""
    fields: dict[str, Any] = {
        "kind": "training", "name": "small", "model": "tiny", "profile": "small", "sequence_length": 128,
        "global_batch": 16, "micro_batch": 4, "steps": 5,
    }  # fmt: skip
    return TrainingScenario.model_validate(fields | changes)
