"""What the keys of all kinds of scenarios have in common, and how one is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from batchsim.errors import InputError, shown
from batchsim.refusal import Override, Refusals, choice, refused
from batchsim.yaml_loader import Document

# The kinds of scenarios, and the command that takes each.
COMMANDS = {
    "serving": "batchsim run",
    "dynamic": "batchsim run",
    "training": "batchsim run",
    "tiles": "batchsim tiles",
    "sweep": "batchsim sweep",
    "plan": "batchsim plan",
}

MAX_ENTRIES = 1000
DRAFT = {"$schema": "https://json-schema.org/draft/2020-12/schema"}


class Model(BaseModel):
    """A mapping of a scenario: frozen, strict, and without unknown keys."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True)


def key_of(table: Mapping[str, object]) -> Callable[[str], str]:
    """A check that a value is a name in `table`."""

    def check(value: str) -> str:
        if value not in table:
            raise refused(shown(value), choice(value, list(table)))
        return value

    return check


def distinct(wanted: str) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """A check that no value occurs twice; `wanted` says what would do."""

    def check(values: tuple[Any, ...]) -> tuple[Any, ...]:
        for i, value in enumerate(values):
            if value in values[:i]:
                raise refused(f"{value} twice", wanted)
        return values

    return check


def _printable(value: str) -> str:
    if not value.isprintable() or value.isspace():
        raise refused(shown(value), "printable text on one line")
    return value


def _listed(value: object) -> object:
    return value if isinstance(value, list | tuple) else (value,)


def _either(schema: dict[str, Any]) -> None:
    for key in ("type", "minLength", "maxLength", "minItems", "maxItems"):
        schema.pop(key, None)
    items = schema.pop("items")
    schema["anyOf"] = [items, {"type": "array", "items": items, "minItems": 1, "maxItems": MAX_ENTRIES}]


Value = TypeVar("Value")
Text = Annotated[str, AfterValidator(_printable), Field(min_length=1, max_length=200)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Milliseconds = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
# A tuple that a file may write as a list, or as its only value.
OneOrMore = Annotated[
    tuple[Value, ...],
    BeforeValidator(_listed),
    Field(strict=False, min_length=1, max_length=MAX_ENTRIES, json_schema_extra=_either),
]

Scenario = TypeVar("Scenario", bound=Model)


def refusals_of(model: type[Model], hints: Mapping[str, tuple[str, str]] | None = None) -> Refusals:
    """What to say about mistakes in one kind of scenario; `hints` as `Refusals` takes them."""
    schema = model.model_json_schema()
    schema["properties"]["kind"] = {"enum": list(COMMANDS)}
    return Refusals(schema, hints or {})


def read(
    model: type[Scenario], refusals: Refusals, document: Document, file: str, sets: Iterable[str | Override]
) -> Scenario:
    """The scenario of one kind that `document` holds, with the values of `sets` put into it.

    Raises:
        InputError: with everything that is wrong, a line each.
    """
    overrides = [Override.parse(entry) if isinstance(entry, str) else entry for entry in sets]
    for override in overrides:
        override.apply(document.data)
    (own,) = get_args(model.model_fields["kind"].annotation)
    found = document.data.get("kind")
    if isinstance(found, str) and found in COMMANDS and found != own:
        wanted = f"{own}: `{COMMANDS[found]}` is the command for this one"
        raise InputError(file, "kind", found, wanted, line=document.lines.get(("kind",)))
    try:
        return model.model_validate(document.data)
    except ValidationError as error:
        raise refusals.explain(error, document, file, overrides) from None
