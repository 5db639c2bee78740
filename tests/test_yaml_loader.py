"""Scalars mean what YAML 1.2 says; whatever is ambiguous, unbounded or no mapping is refused in a sentence."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchsim.errors import InputError
from batchsim.yaml_loader import MAX_BYTES, MAX_DEPTH, MAX_VALUES, load, parse, parse_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100_000.0),
        ("+.5", 0.5),
        ("3.", 3.0),
        ("-.inf", -math.inf),
        ("12", 12),
        ("-7", -7),
        ("010", 10),
        ("0o17", 15),
        ("0xff", 255),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("off", "off"),
        ("y", "y"),
        ("8_192", "8_192"),
        ("1:30", "1:30"),
        ("190:20:30", "190:20:30"),
        ("2026-01-30", "2026-01-30"),
        ("0b11", "0b11"),
        ("1e", "1e"),
        ("'12'", "12"),
        ("=", "="),
        ("<<", "<<"),
        ("[sync, async]", ["sync", "async"]),
        ("{a: 1}", {"a": 1}),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    read = parse_value(text, "--set")
    assert read == value
    assert type(read) is type(value)


def test_nan_is_read_as_a_number_for_the_fields_to_refuse() -> None:
    assert math.isnan(parse_value(".nan", "--set"))


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("", None, "found nothing, wanted a mapping"),
        ("# a comment only\n", None, "found nothing, wanted a mapping"),
        ("- a\n- b\n", None, "a list at the top"),
        ("word", None, "the string 'word' at the top"),
        ("a: 1\nb: 2\na: 3\n", 3, "a: found the key again, after line 1"),
        ("w:\n  a: 1\n  a: 1\n", 3, "w.a: found the key again, after line 2"),
        ("a: b: c", 1, "mapping values are not allowed here"),
        ("a: [1\n", 2, "expected ',' or ']'"),
        ("\ta: 1", 1, "cannot start any token"),
        ("--- {a: 1}\n--- {b: 2}\n", 2, "a second document"),
        ("1.5: a", 1, "found 1.5 as a key, wanted a string"),
        ("null: a", 1, "found null as a key"),
        ("? [x]\n: a", 1, "a key that is no word"),
        ("a: *nowhere", 1, "undefined alias"),
        ("a: !!python/object/apply:os.system [x]", 1, "the tag !!python/object/apply:os.system"),
        ("a: !!set {x}", 1, "the tag !!set"),
        ("a: !!binary aGk=", 1, "the tag !!binary"),
        ("a: !!timestamp 2026-01-30", 1, "the tag !!timestamp"),
        ("a: !!int word", 1, "tagged as int"),
        ("a: \x07", 1, "unprintable character '\\x07'"),
        ('a: "\\ud800"', 1, "half a character"),
        ('a: "\\UFFFFFFFF"', None, "an escape that is no character"),
        ("a: " + "9" * 41, 1, "a number of 41 digits"),
        ("a: " + "9" * 5000, 1, "a number of 5000 digits"),
    ],
)
def test_refusals_name_the_file_the_line_and_the_finding(text: str, line: int | None, told: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(text, "x.yaml")
    message = str(caught.value)
    assert message.startswith("x.yaml: " if line is None else f"x.yaml:{line}: ")
    assert told in message
    assert "\n" not in message


def test_lines_of_keys_and_items_are_known() -> None:
    document = parse("a: 1\nb:\n  c: 2\n  d:\n  - x\n  - y\n", "x.yaml")
    assert document.data == {"a": 1, "b": {"c": 2, "d": ["x", "y"]}}
    assert {path: line for path, line in document.lines.items() if path} == {
        ("a",): 1,
        ("b",): 2,
        ("b", "c"): 3,
        ("b", "d"): 4,
        ("b", "d", 0): 5,
        ("b", "d", 1): 6,
    }


def test_aliases_are_copied_not_shared() -> None:
    data = parse("a: &x {k: 1}\nb: *x\n", "x.yaml").data
    assert data["a"] == data["b"]
    assert data["a"] is not data["b"]


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
        "a: &a [*a]",
        "&a {k: *a}",
        "a: " + "[" * 100_000,
        "a: " + "{b: " * 5_000,
        "".join(" " * i + "a:\n" for i in range(MAX_DEPTH + 2)),
        "a: [" + "x," * (MAX_VALUES + 1) + "]",
    ],
    ids=["billion laughs", "recursion", "recursion of keys", "brackets", "braces", "depth", "many values"],
)
def test_small_files_cannot_grow_large(text: str) -> None:
    start = time.perf_counter()
    with pytest.raises(InputError, match=r"more than|deeper than"):
        parse(text, "x.yaml")
    assert time.perf_counter() - start < 5


def test_what_cannot_be_read_as_a_file_is_refused(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"a: 1\nname: caf\xe9\n")
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (MAX_BYTES + 1))
    wide = tmp_path / "utf16.yaml"
    wide.write_bytes("a: 1".encode("utf-16"))
    for path, told in [
        (tmp_path / "missing.yaml", "No such file"),
        (tmp_path, "Is a directory"),
        (latin, "0xe9"),
        (large, "bytes"),
        (wide, "not UTF-8"),
        (Path("/dev/zero"), "bytes"),
        (Path("nul\0byte"), "impossible path"),
    ]:
        with pytest.raises(InputError, match=told):
            load(path)
    with pytest.raises(InputError) as caught:
        load(latin)
    assert str(caught.value).startswith(f"{latin}:2: ")


def test_a_byte_order_mark_and_the_largest_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    content = b"\xef\xbb\xbfa: 1\n"
    path.write_bytes(content + b"#" * (MAX_BYTES - len(content)))
    assert load(path).data == {"a": 1}


JSON_KEYS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | JSON_KEYS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(JSON_KEYS, inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(JSON_KEYS, JSON, max_size=5))
def test_json_is_read_as_json(data: dict[str, Any]) -> None:
    assert parse(json.dumps(data), "x.json").data == data


YAML = st.lists(st.sampled_from([*"ab:?-[]{},&*!|>'\"%#@` \n0.e", "<<", "---", "!!int", "\\u"]), max_size=30)


@given(st.text() | YAML.map("".join))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        assert isinstance(parse(text, "x.yaml").data, dict)
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017 (both outcomes are right)
