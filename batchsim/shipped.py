"""Profiles by name or by path: those that are installed, and those that a user has measured."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from batchsim.errors import InputError


def shipped(folder: str) -> dict[str, Traversable]:
    """The JSON files in a folder of `calibration/profiles`, by their names without the ending."""
    place = files("calibration") / "profiles" / folder
    if not place.is_dir():
        return {}
    return {entry.name.removesuffix(".json"): entry for entry in place.iterdir() if entry.name.endswith(".json")}


def read_profile(
    name: str, base: Path | None, folder: str, *, what: str, wanted: str, key: str = "profile"
) -> tuple[str, str]:
    """(text, source) of the file at `name`, relative to `base`, or else of the shipped profile of that name.

    `what` a profile is called, what was `wanted` where there is none, and the `key` that named it, are for errors.

    Raises:
        InputError: no such profile, or a file that is no text.
    """
    path = (base or Path()) / name
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except UnicodeDecodeError:
            raise InputError(str(path), "", "bytes that are no text", f"a {what} in JSON") from None
    known = shipped(folder)
    if name not in known:
        source = None if base is None else str(path)
        raise InputError(source, key, repr(name), f"{wanted}, or one of: {', '.join(sorted(known))}")
    return known[name].read_text(encoding="utf-8"), known[name].name
