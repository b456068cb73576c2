"""How a preset was made: round trip, and every wrong field refused by its name."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockcache.runtime import ConfigError, Provenance

texts = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=40)
counts = st.integers(1, 10**9)
numbers = st.one_of(st.floats(0, 1e300), st.integers(0, 10**6))
made = st.builds(
    Provenance,
    kind=texts,
    value=st.none() | numbers,
    costs=st.none() | texts,
    predicted_speedup=st.none() | numbers,
    predicted_loss=st.none() | numbers,
    images=st.none() | counts,
    profile=st.none() | texts,
    alignment=st.none() | texts,
    alignment_report=st.none() | texts,
    replaced_steps=st.none() | counts,
    tried=st.none() | st.dictionaries(texts, numbers, min_size=1),
)


@given(made)
def test_it_comes_back_from_json(provenance):
    text = json.dumps(provenance.to_json())
    assert Provenance.from_json(json.loads(text)) == provenance
    assert "null" not in text, "what does not apply is left out"


def test_the_fields_that_apply_are_written_in_one_order():
    written = Provenance(
        tried={"auto-12": 0.5, "karras-14": 0.25}, kind="joint", replaced_steps=20
    ).to_json()
    assert json.dumps(written) == (
        '{"kind": "joint", "replaced_steps": 20, "tried": {"auto-12": 0.5, "karras-14": 0.25}}'
    )


FIELDS = [field.name for field in dataclasses.fields(Provenance)]
WRONG = [True, -1, [], {}, "", "a\nb", float("nan"), float("inf"), None, {"x": -1}]


@given(made, st.sampled_from(FIELDS), st.sampled_from(WRONG))
def test_a_wrong_field_is_refused_by_its_name(provenance, name, value):
    with pytest.raises(ConfigError) as caught:
        Provenance.from_json({**provenance.to_json(), name: value})
    assert f"as {name!r}, got" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ([], "Expected an object that says how a preset was made, got []."),
        ({}, "Expected a 'kind' of policy, got none."),
        ({"kind": 3}, "Expected a printable text of 1 to 200 characters as 'kind', got 3."),
        (
            {"kind": "budget", "images": 0},
            "Expected a whole number of 1 or more as 'images', got 0.",
        ),
        (
            {"kind": "joint", "tried": {"": 0.5}},
            "Expected finite distances of 0 or more by name as 'tried', got {'': 0.5}.",
        ),
        (
            {"kind": "x", "value": None},
            "Expected a finite number of 0 or more as 'value', got null.",
        ),
    ],
)
def test_the_errors_say_what_was_expected(content, error):
    with pytest.raises(ConfigError) as caught:
        Provenance.from_json(content)
    assert str(caught.value) == error


def test_an_unknown_field_is_refused_by_its_name():
    with pytest.raises(ConfigError, match=r"Expected only fields of \['kind', .*, got 'delta'\."):
        Provenance.from_json({"kind": "threshold", "delta": 0.5})
