"""Requests and processes that several tests ask for."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence

from batchsim.batching.continuous import Request


def uniform_requests(num_prompts: int, prompt_tokens: int, output_tokens: int) -> Sequence[Request]:
    """`num_prompts` equal requests, all present at the start."""
    return [Request(i, prompt_tokens, output_tokens) for i in range(num_prompts)]


def printed(script: str, *hash_seeds: str) -> set[str]:
    """Digests of what `script` prints in processes that hash strings by these seeds: one, if it is the same bytes."""
    return {
        hashlib.sha256(
            subprocess.run(
                [sys.executable, "-c", script],
                env=os.environ | {"PYTHONHASHSEED": seed},
                capture_output=True,
                check=True,
            ).stdout
        ).hexdigest()
        for seed in hash_seeds
    }
