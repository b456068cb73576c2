"""The strict JSON reader: what it takes is what json takes, what it refuses it names."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockcache.runtime import BundleFormatError
from blockcache.runtime.bundles.strict_json import MOST_BYTES, Field, parse_json

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=15,
)


@given(values)
def test_what_json_writes_is_read_as_json_reads_it(value):
    assert parse_json(json.dumps(value).encode(), "f").value == value


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": 1, "a": 1}', "the key 'a' twice"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "the key 'b' twice"),
        (b"[NaN]", "NaN, which is no JSON"),
        (b"[-Infinity]", "-Infinity, which is no JSON"),
        (b"[1e999]", "1e999, which is no JSON"),
        (b"[" * 30 + b"]" * 30, "lists and objects more than 20 deep"),
        (b"9" * 5000, "a number of 5000 characters"),
        (b"0." + b"9" * 5000, "a number of 5002 characters"),
        (b'{"a": ', "Expecting value: line 1 column 7 (char 6)"),
        (b"\xff", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
    ],
)
def test_what_is_no_strict_json_is_refused(content, reason):
    with pytest.raises(BundleFormatError) as caught:
        parse_json(content, "f.json")
    text = f"Expected JSON in f.json, got {reason}. The file is damaged: compile again."
    assert str(caught.value) == text


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_nesting_without_end_is_refused(opening):
    with pytest.raises(BundleFormatError, match="Expected JSON in f, got maximum recursion"):
        parse_json(opening * 100_000, "f")


def test_a_file_of_absurd_size_is_refused():
    with pytest.raises(BundleFormatError, match=f"Expected at most {MOST_BYTES} bytes in f, got "):
        parse_json(b" " * (MOST_BYTES + 1), "f")


def refused(read, value, wanted, got):
    with pytest.raises(BundleFormatError) as caught:
        read(Field(value, "a.b[2]", "f.json"))
    assert str(caught.value) == (
        f"f.json: expected {wanted} for 'a.b[2]', got {got}. Compile the model again."
    )


@pytest.mark.parametrize(
    ("read", "value", "wanted", "got"),
    [
        (lambda f: f.whole(0, 9), True, "a whole number from 0 to 9", "True"),
        (lambda f: f.whole(0, 9), 10, "a whole number from 0 to 9", "10"),
        (lambda f: f.whole(0, 9), 1.0, "a whole number from 0 to 9", "1.0"),
        (lambda f: f.number(0, 9), float("inf"), "a number from 0 to 9", "inf"),
        (lambda f: f.number(0, 9), "1", "a number from 0 to 9", "'1'"),
        (lambda f: f.text(3), "abcd", "a printable text of 1 to 3 characters", "'abcd'"),
        (lambda f: f.text(3), "\x1b[", "a printable text of 1 to 3 characters", "'\\x1b['"),
        (lambda f: f.text(3), "", "a printable text of 1 to 3 characters", "''"),
        (lambda f: f.sha256(), "AB" * 32, "64 lower-case hexadecimal digits",
         f"{repr('AB' * 32)[:57]}..."),
        (lambda f: f.choice(["x", "y"]), "z", "one of ['x', 'y']", "'z'"),
        (lambda f: f.choice(["x", "y"]), ["x"], "one of ['x', 'y']", "['x']"),
        (lambda f: f.items(), {}, "a list", "{}"),
        (lambda f: f.items(1), [1, 2], "at most 1 entries", "[1, 2]"),
        (lambda f: f.table(), [], "an object", "[]"),
        (lambda f: f.fields(["x"]), {}, "an object with 'x'", "{}"),
    ],
)  # fmt: skip
def test_a_field_of_another_kind_is_refused_by_its_way(read, value, wanted, got):
    refused(read, value, wanted, got)


def test_unknown_fields_are_refused_by_their_way():
    with pytest.raises(BundleFormatError) as caught:
        Field({"x": 1, "colour": "red"}, "", "f").fields(["x"])
    assert str(caught.value) == (
        "f: expected no such field for 'colour', got 'red'. Compile the model again."
    )


def test_the_way_to_a_field_is_written_as_one_would_look_for_it():
    root = Field({"segments": [{"block": 1}]}, "", "f")
    assert root.fields(["segments"])["segments"].items()[0].table()["block"].way == (
        "segments[0].block"
    )
