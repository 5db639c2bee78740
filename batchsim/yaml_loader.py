"""YAML as a person means it: read safely, with YAML 1.2's scalars, and refused where it is ambiguous.

Unlike YAML 1.1, which PyYAML reads by default: `1e-3` is a number; `yes`, `no`, `on` and `off` are strings, and so
are `1:30`, `8_192` and dates; `010` is ten. Duplicate keys, keys that are neither strings nor plain
integers (which are read as their digits), tags of other types and
several documents in a file are refused; size, depth and the number of values (aliases count each time) are bounded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from batchsim.errors import InputError, shown

MAX_BYTES = 1 << 20
MAX_DEPTH = 16
MAX_VALUES = 10_000
MAX_DIGITS = 40

KeyPath = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"

# The core schema of YAML 1.2.2, section 10.3.2.
_SCALARS: dict[str, tuple[re.Pattern[str], list[str]]] = {
    "null": (re.compile(r"(?:~|null|Null|NULL|)"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"(?:true|True|TRUE|false|False|FALSE)"), list("tTfF")),
    "int": (re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)"), list("-+0123456789")),
    "float": (
        re.compile(
            r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))"
        ),
        list("-+.0123456789"),
    ),
}


@dataclass(frozen=True, slots=True)
class Document:
    """What a file says: plain data with a mapping at the top, and the line on which each key or item stands."""

    data: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)


class ScenarioLoader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's scalars and bounds on depth and size, up to the tree of nodes."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own form)

    def __init__(self, text: str, file: str) -> None:
        super().__init__(text)
        self.file = file
        self._depth = 0
        self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        self._nodes += 1
        _bound(self.file, self._depth, self._nodes, line=self.line + 1)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


for _name, (_pattern, _first) in _SCALARS.items():
    ScenarioLoader.add_implicit_resolver(_TAG + _name, re.compile(f"{_pattern.pattern}$"), _first)


def load(path: Path) -> Document:
    """Read a YAML file whose top level is a mapping.

    Raises:
        InputError: anything else.
    """
    file = str(path)
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(file, "", f"no readable file ({reason})", "a YAML file") from None
    except ValueError:
        raise InputError(ascii(file), "", "an impossible path", "a YAML file") from None
    if len(raw) > MAX_BYTES:
        raise InputError(file, "", f"more than {MAX_BYTES} bytes", f"at most {MAX_BYTES} bytes")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(file, "", f"byte 0x{raw[error.start]:02x}, which is not UTF-8", "UTF-8", line=line) from None
    return parse(text, file)


def parse(text: str, file: str) -> Document:
    """Read YAML text whose top level is a mapping; `file` is what errors name."""
    lines: dict[KeyPath, int] = {}
    node = _compose(text, file)
    if node is None:
        raise InputError(file, "", "nothing", "a mapping of keys to values")
    data = _Reader(file, lines).read(node, ())
    if not isinstance(data, dict):
        raise InputError(file, "", f"{shown(data)} at the top", "a mapping of keys to values")
    return Document(data, lines)


def parse_value(text: str, option: str) -> Any:
    """Read one value, as after `key:` in a file; `option` is what errors name. Empty text is null."""
    try:
        node = _compose(text, option)
        return None if node is None else _Reader(option, {}).read(node, ())
    except InputError as error:
        error.line = None
        raise


def _compose(text: str, file: str) -> yaml.Node | None:
    try:
        loader = ScenarioLoader(text, file)
        try:
            return loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        what = error.problem or error.context or "a syntax error"
        if error.context == "expected a single document in the stream":
            raise InputError(file, "", "a second document", "one document", line=_line(error)) from None
        raise InputError(file, "", f"a mistake in the YAML ({what})", "valid YAML", line=_line(error)) from None
    except yaml.reader.ReaderError as error:
        # Its attributes depend on where it was raised; for text it is the character and its position.
        line = text.count("\n", 0, error.position) + 1
        found = f"the unprintable character {text[error.position]!a}"
        raise InputError(file, "", found, "printable text", line=line) from None
    except (ValueError, OverflowError):
        # PyYAML hands an escape beyond Unicode, such as \UFFFFFFFF, to chr().
        raise InputError(file, "", "an escape that is no character", "valid YAML") from None


def _line(error: yaml.MarkedYAMLError) -> int | None:
    mark = error.problem_mark or error.context_mark
    return None if mark is None else mark.line + 1


def _bound(file: str, depth: int, values: int, *, line: int | None) -> None:
    if depth > MAX_DEPTH:
        raise InputError(file, "", f"values nested deeper than {MAX_DEPTH} levels", "fewer levels", line=line)
    if values > MAX_VALUES:
        raise InputError(file, "", f"more than {MAX_VALUES} values", "fewer values or aliases", line=line)


class _Reader:
    """Turns nodes into plain data, and notes lines. Aliased nodes are read again, so nothing is shared."""

    def __init__(self, file: str, lines: dict[KeyPath, int]) -> None:
        self._file = file
        self._lines = lines
        self._values = 0

    def read(self, node: yaml.Node, path: KeyPath) -> Any:
        line = node.start_mark.line + 1
        self._values += 1
        _bound(self._file, len(path) + 1, self._values, line=line)
        self._lines.setdefault(path, line)
        match node:
            case yaml.MappingNode():
                self._expect_tag(node, "map", path)
                return self._mapping(node, path)
            case yaml.SequenceNode():
                self._expect_tag(node, "seq", path)
                return [self.read(item, (*path, i)) for i, item in enumerate(node.value)]
            case _:
                return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = self._scalar(key_node, path) if isinstance(key_node, yaml.ScalarNode) else None
            if isinstance(key, int) and str(key) == key_node.value:
                key = key_node.value
            if not isinstance(key, str):
                found = f"{shown(key)} as a key" if isinstance(key_node, yaml.ScalarNode) else "a key that is no word"
                raise self._error(path, found, "a string", line)
            here = (*path, key)
            if key in data:
                raise self._error(here, f"the key again, after line {self._lines[here]}", "each key once", line)
            self._lines[here] = line
            data[key] = self.read(value_node, here)
        return data

    def _scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        text: str = node.value
        kind = node.tag.removeprefix(_TAG)
        line = node.start_mark.line + 1
        if kind == "str":
            try:
                # JSON writes a character beyond the 16-bit plane as two escapes; join them.
                return text.encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeDecodeError:
                raise self._error(path, f"{text!a}, half a character", "whole characters", line) from None
        if kind not in _SCALARS:
            raise self._error(path, f"a value with the tag {shown_tag(node.tag)}", "plain values without tags", line)
        if not _SCALARS[kind][0].fullmatch(text):
            raise self._error(path, f"{shown(text)} tagged as {kind}", "a plain value without a tag", line)
        match kind:
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int":
                if len(text) > MAX_DIGITS:
                    raise self._error(path, f"a number of {len(text)} digits", f"at most {MAX_DIGITS} digits", line)
                base = {"0o": 8, "0x": 16}.get(text[:2], 10)
                return int(text, base)
            case _:
                return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))

    def _expect_tag(self, node: yaml.Node, kind: str, path: KeyPath) -> None:
        if node.tag != _TAG + kind:
            found = f"a value with the tag {shown_tag(node.tag)}"
            raise self._error(path, found, "plain values without tags", node.start_mark.line + 1)

    def _error(self, path: KeyPath, found: str, wanted: str, line: int) -> InputError:
        return InputError(self._file, key_text(path), found, wanted, line=line)


def shown_tag(tag: str) -> str:
    """`!!set` for a tag of YAML's own, any other as it is."""
    return ascii(tag.replace(_TAG, "!!"))[1:-1]


def key_text(path: KeyPath) -> str:
    """`workload.num_prompts`; unprintable characters are escaped."""
    return ".".join(part if isinstance(part, str) and part.isprintable() else ascii(part) for part in path)
