"""Refusals: values put over a file's, and what pydantic found wrong, as sentences for the user."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from batchsim.errors import InputError, nearest, one_of, shown
from batchsim.yaml_loader import Document, KeyPath, key_text, parse_value


@dataclass(frozen=True, slots=True)
class Override:
    """A value that an option of the command line puts in the place of the file's; `option` is what errors name."""

    option: str
    path: tuple[str, ...]
    value: Any

    @classmethod
    def parse(cls, text: str) -> Override:
        """From `PATH=VALUE`, the path dotted, the value written as in YAML."""
        key, equals, value = text.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            raise InputError("--set", "", shown(text), "PATH=VALUE, such as workload.num_prompts=64")
        return cls("--set", path, parse_value(value, f"--set {key_text(path)}"))

    def apply(self, data: dict[str, Any]) -> None:
        """Put the value into `data`; mappings on the way there are made where they are missing."""
        *parents, last = self.path
        for i, part in enumerate(parents):
            data = data.setdefault(part, {})
            if not isinstance(data, dict):
                place = key_text(self.path[: i + 1])
                raise InputError(self.option, key_text(self.path), f"{shown(data)} at {place}", "a mapping there")
        data[last] = self.value


def refused(found: str, wanted: str, key: str = "") -> PydanticCustomError:
    """An error for a validator to raise; `key` is relative to the model or field that the validator belongs to."""
    context = {"found": found, "wanted": wanted, "key": key}
    return PydanticCustomError("refused", "found {found}, wanted {wanted}", context)


def choice(value: object, known: list[str]) -> str:
    """What would do where one of `known` is wanted, with the one nearest to `value`."""
    guess = nearest(value, known) if isinstance(value, str) and len(known) > 1 else None
    return one_of(known) + (f" (the nearest: {guess})" if guess else "")


class Refusals:
    """Explains validation errors of one kind of file.

    `schema` is its JSON schema. `hints` holds, for keys that are unknown but understood, what to say: found and
    wanted.
    """

    def __init__(self, schema: dict[str, Any], hints: Mapping[str, tuple[str, str]]) -> None:
        self._schema = schema
        self._hints = hints
        self._places = {str(path[-1]): key_text(path) for path in self._leaves(()) if path[-1] != "kind"}

    def explain(
        self, error: ValidationError, document: Document, file: str, overrides: Iterable[Override]
    ) -> InputError:
        """One error with everything that is wrong, each blamed on the line or the option that it came from."""
        problems = [
            (detail["type"], self._problem(detail, document, file, tuple(overrides))) for detail in _told(error)
        ]
        # A key that is missing only because it is misspelt is told once.
        meant = {problem.wanted for kind, problem in problems if kind == "extra_forbidden"}
        told = [problem for kind, problem in problems if kind != "missing" or problem.key not in meant]
        return InputError.all_of(sorted(told, key=lambda problem: problem.line or 0))

    def _problem(
        self, detail: ErrorDetails, document: Document, file: str, overrides: tuple[Override, ...]
    ) -> InputError:
        path: KeyPath = detail["loc"]
        match detail["type"]:
            case "refused":
                context = detail["ctx"]
                path = (*path, *filter(None, [context["key"]]))
                found, wanted = context["found"], context["wanted"]
            case "missing":
                found, wanted = "nothing", self._wanted(path)
            case "extra_forbidden":
                found, wanted = self._unknown_key(path)
            case _:
                found, wanted = shown(detail["input"]), self._wanted(path, detail["input"])
        for override in reversed(overrides):
            if _within(path, override.path) or _within(override.path, path):
                return InputError(override.option, key_text(path), found, wanted)
        lines = (document.lines.get(path[:n]) for n in range(len(path), 0, -1))
        return InputError(file, key_text(path), found, wanted, line=next(filter(None, lines), None))

    def _unknown_key(self, path: KeyPath) -> tuple[str, str]:
        *parents, last = path
        word = str(last)
        if word in self._hints:
            return self._hints[word]
        here = list(self._at(tuple(parents)).get("properties", ()))
        if word in self._places:
            return "a key of another place", self._places[word]
        if guess := nearest(word, here):
            return "an unknown key", key_text((*parents, guess))
        if guess := nearest(word, self._places):
            return "an unknown key", self._places[guess]
        return "an unknown key", one_of(here)

    def _leaves(self, path: KeyPath) -> list[KeyPath]:
        """The paths of all keys that a file may hold, below `path`."""
        below = [(*path, key) for key in self._at(path).get("properties", ())]
        return below + [leaf for child in below for leaf in self._leaves(child)]

    def _at(self, path: KeyPath) -> dict[str, Any]:
        """The schema of the value at `path`; empty where there is to be none."""
        schema = self._schema
        for part in path:
            schema = schema.get("items", {}) if isinstance(part, int) else schema.get("properties", {}).get(part, {})
            if "$ref" in schema:
                schema = self._schema["$defs"][schema["$ref"].rpartition("/")[2]]
        return schema

    def _wanted(self, path: KeyPath, value: object = None) -> str:
        """What the schema asks for at `path`, in words."""
        schema = self._at(path)
        if "const" in schema:
            return f"{schema['const']}, the only one in this version"
        if "enum" in schema:
            return choice(value, schema["enum"])
        match schema.get("type"):
            case "integer":
                return f"an integer from {schema['minimum']} to {schema['maximum']}"
            case "number":
                return f"a number from {schema['minimum']:g} to {schema['maximum']:g}"
            case "boolean":
                return "true or false"
            case "string":
                return f"text of {schema['minLength']} to {schema['maxLength']} characters"
            case "array":
                return f"a list of one or more of {', '.join(schema['items']['enum'])}"
            case _:
                return f"a mapping with {', '.join(schema['required'])}"


def _told(error: ValidationError) -> list[ErrorDetails]:
    """The errors worth telling: not what follows from a wrong `kind`, nor from a wrong entry for its list."""
    details = error.errors(include_url=False)
    kinds = [d["loc"] for d in details if d["loc"][-1:] == ("kind",) and d["type"] == "literal_error"]
    details = [d for d in details if d["loc"] in kinds or not any(_within(d["loc"], kind[:-1]) for kind in kinds)]
    entries = [detail["loc"][:-1] for detail in details if detail["loc"] and isinstance(detail["loc"][-1], int)]
    return [detail for detail in details if detail["type"] != "too_short" or detail["loc"] not in entries]


def _within(path: KeyPath, scope: KeyPath) -> bool:
    return path[: len(scope)] == scope
