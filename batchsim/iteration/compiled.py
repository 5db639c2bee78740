"""The compiler, and how its results are kept between processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])

# Sources outside this package that hold constants for it.
_CONSTANTS = ("answered.py", "router.py", "served.py")

# Numbers in compiled functions: Python's and numpy's alike, so that mypy has nothing to tell apart.
Int: TypeAlias = Any
Float: TypeAlias = Any
Bool: TypeAlias = Any

# Compiled functions allocate nothing, so arrays need not be counted whenever a function hands them on to another.
_njit: Any = numba.njit
_OPTIONS: dict[str, Any] = {"_nrt": False, "error_model": "numpy"}


def njit(function: Function) -> Function:
    """A function for compiled ones to call."""
    return cast(Function, _njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **_OPTIONS)(function))


def entry(function: Function) -> Function:
    """A function for Python to call; its compiled form is kept between processes where there is a folder for that."""
    try:
        return cast(Function, _njit(cache=True, **_OPTIONS)(function))
    except RuntimeError:  # no such folder
        return cast(Function, _njit(**_OPTIONS)(function))


def sources_digest() -> int:
    """A number for the state of this package's sources, and of those that hold constants for it.

    numba keeps compiled code until the file of its outermost function changes, and does not look at the files of what
    that one calls. A function that closes over this number is compiled anew when any of them changes.
    """
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in (*sorted(folder.glob("*.py")), *(folder.parent / name for name in _CONSTANTS)):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest()[:7], "big")
