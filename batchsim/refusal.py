"""Refusals: values put over a file's, and what pydantic found wrong, as sentences for the user."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
        places: dict[str, set[str]] = {}
        for path in self._leaves(schema, ()):
            places.setdefault(str(path[-1]), set()).add(key_text(path))
        # A key that has its place in several mappings tells nothing about which one was meant.
        self._places = {word: found.pop() for word, found in places.items() if len(found) == 1 and word != "kind"}

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
        path, schema = self._locate(detail["loc"], document.data)
        match detail["type"]:
            case "refused":
                context = detail["ctx"]
                path = (*path, *filter(None, [context["key"]]))
                found, wanted = context["found"], context["wanted"]
            case "missing":
                found, wanted = "nothing", self._wanted(schema)
            case "extra_forbidden":
                parent = self._mapping(self._locate(detail["loc"][:-1], document.data)[1])
                found, wanted = self._unknown_key(path, parent)
            case "union_tag_not_found" | "union_tag_invalid":
                # The kind is missing or wrong: nothing else in the mapping can be judged.
                kind = detail["input"].get("kind")
                found = shown(kind) if "kind" in detail["input"] else "nothing"
                wanted = choice(kind, list(_branches(schema)))
                if found == "nothing" and (typo := self._misspelt_kind(schema, detail["input"])):
                    found, wanted, path = "an unknown key", key_text((*path, "kind")), (*path, typo)
                else:
                    path = (*path, "kind")
            case _:
                found, wanted = shown(detail["input"]), self._wanted(schema, detail["input"])
        for override in reversed(overrides):
            if _within(path, override.path) or _within(override.path, path):
                return InputError(override.option, key_text(path), found, wanted)
        lines = (document.lines.get(path[:n]) for n in range(len(path), 0, -1))
        return InputError(file, key_text(path), found, wanted, line=next(filter(None, lines), None))

    def _unknown_key(self, path: KeyPath, parent: dict[str, Any]) -> tuple[str, str]:
        *parents, last = path
        word = str(last)
        if word in self._hints:
            return self._hints[word]
        here = list(parent.get("properties", ()))
        if (place := self._places.get(word)) is not None:
            return (
                ("a key of another place", place) if place != _text(path) else ("a key of another kind", one_of(here))
            )
        if guess := nearest(word, here):
            return "an unknown key", key_text((*parents, guess))
        if guess := nearest(word, self._places):
            return "an unknown key", self._places[guess]
        return "an unknown key", one_of(here)

    def _misspelt_kind(self, schema: dict[str, Any], mapping: Mapping[str, Any]) -> str | None:
        """The key of `mapping`, which lacks a kind, that was meant to be it."""
        known = {key for branch in _branches(schema).values() for key in self._plain(branch)["properties"]}
        return next((key for key in mapping if key not in known and nearest(key, sorted(known)) == "kind"), None)

    def _leaves(self, schema: dict[str, Any], path: KeyPath) -> Iterator[KeyPath]:
        """The paths of all keys that a file may hold below `path`, those in lists without their numbers."""
        schema = self._plain(schema)
        for branch in _branches(schema).values():
            yield from self._leaves(branch, path)
        if "items" in (array := _array(schema)):
            yield from self._leaves(array["items"], path)
        for key, below in schema.get("properties", {}).items():
            yield (*path, key)
            yield from self._leaves(below, (*path, key))

    def _locate(self, loc: tuple[str | int, ...], data: object) -> tuple[KeyPath, dict[str, Any]]:
        """The place in the file that pydantic means by `loc`, and the schema of what belongs there.

        Pydantic's place also names the branches of unions, and the entries of a list where the file has a single value.
        """
        path: list[str | int] = []
        schema, value = self._plain(self._schema), data
        for part in loc:
            if part in (branches := _branches(schema)):
                schema = self._plain(branches[str(part)])
                continue
            if isinstance(part, int):
                array = _array(schema)
                ahead = array.get("prefixItems", ())
                schema = self._plain(ahead[part] if part < len(ahead) else array.get("items", {}))
            else:
                schema = self._mapping(schema)
                schema = self._plain(schema.get("properties", {}).get(part) or _any_key(schema))
            match value:
                case dict() if isinstance(part, str):
                    value = value.get(part, _MISSING)
                case list() if isinstance(part, int):
                    value = value[part] if part < len(value) else _MISSING
                case _:
                    continue
            path.append(part)
        return tuple(path), schema

    def _plain(self, schema: dict[str, Any]) -> dict[str, Any]:
        """The schema that a reference stands for; of one that null satisfies too, the other alternative."""
        while True:
            if "$ref" in schema:
                schema = self._schema["$defs"][schema["$ref"].rpartition("/")[2]]
                continue
            some = [option for option in schema.get("anyOf", ()) if option.get("type") != "null"]
            if len(some) != 1:
                return schema
            (schema,) = some

    def _mapping(self, schema: dict[str, Any]) -> dict[str, Any]:
        """The schema itself, or of a name or a mapping the mapping."""
        options = [self._plain(option) for option in schema.get("anyOf", ())]
        return next((option for option in options if option.get("type") == "object"), schema)

    def _wanted(self, schema: dict[str, Any], value: object = None) -> str:
        """What the schema asks for, in words."""
        schema = self._plain(schema)
        if "const" in schema:
            return f"{schema['const']}, the only one in this version"
        if "enum" in schema:
            return choice(value, schema["enum"])
        if branches := _branches(schema):
            return f"a mapping with kind: {one_of(list(branches))}"
        if "anyOf" in schema:
            options = [option for option in schema["anyOf"] if option.get("type") != "null"]
            listed = [option["items"] for option in options if "items" in option]
            return one_of(
                [
                    self._wanted(option) + (", or a list of such" if option in listed else "")
                    for option in options
                    if option.get("items") not in options
                ]
            )
        match schema.get("type"):
            case "integer" if "minimum" not in schema:
                return "an integer"
            case "integer":
                return f"an integer from {schema['minimum']} to {schema['maximum']}"
            case "number" if "exclusiveMinimum" in schema:
                return f"a number above {schema['exclusiveMinimum']:g} and at most {schema['maximum']:g}"
            case "number":
                return f"a number from {schema['minimum']:g} to {schema['maximum']:g}"
            case "boolean":
                return "true or false"
            case "string":
                return f"text of {schema['minLength']} to {schema['maxLength']} characters"
            case "array" if "prefixItems" in schema:
                ahead = schema["prefixItems"]
                return f"a list of {len(ahead)}, each {self._wanted(ahead[0])}"
            case "array":
                return f"a list of one or more of {self._entries(schema['items'])}"
            case _:
                keys = schema.get("required") or schema.get("properties", ())
                return f"a mapping with {', '.join(keys)}" if keys else "a mapping"

    def _entries(self, schema: dict[str, Any]) -> str:
        schema = self._plain(schema)
        return ", ".join(schema["enum"]) if "enum" in schema else self._wanted(schema)


_MISSING = object()


def _branches(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The alternatives of a union, by their `kind`; none of any other schema."""
    mapping = schema.get("discriminator", {}).get("mapping", {})
    return {kind: {"$ref": reference} for kind, reference in mapping.items()}


def _any_key(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of the values of a mapping that takes keys of the user's own."""
    found = schema.get("additionalProperties")
    return found if isinstance(found, dict) else {}


def _array(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema itself, or of one value or a list of such the list."""
    return next((option for option in schema.get("anyOf", ()) if option.get("type") == "array"), schema)


def _text(path: KeyPath) -> str:
    return key_text(tuple(part for part in path if not isinstance(part, int)))


def _told(error: ValidationError) -> list[ErrorDetails]:
    """The errors worth telling: not what follows from a wrong `kind`, nor, for a list, from a wrong entry."""
    details = error.errors(include_url=False)
    kinds = [d["loc"] for d in details if d["loc"][-1:] == ("kind",) and d["type"] == "literal_error"]
    details = [d for d in details if d["loc"] in kinds or not any(_within(d["loc"], kind[:-1]) for kind in kinds)]
    return [
        detail
        for detail in details
        if detail["type"] != "too_short"
        or not any(other is not detail and _within(other["loc"], detail["loc"]) for other in details)
    ]


def _within(path: KeyPath, scope: KeyPath) -> bool:
    return path[: len(scope)] == scope
