"""Every Markdown table of the tools is written by one function."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockcache.tools.report.tables import markdown_table

CELL = st.text(st.characters(exclude_characters="\\\r\n", categories=("L", "N", "P", "Zs")))


def read_line(line):
    """The cells of a line, as a Markdown reader splits them."""
    cells = re.split(r"(?<!\\)\|", line)[1:-1]
    return [cell[1:-1].replace("\\|", "|") for cell in cells]


@given(st.data(), st.integers(1, 5), st.integers(0, 4))
@settings(deadline=None, max_examples=100)
def test_every_cell_is_read_back(data, width, height):
    rows = [data.draw(st.lists(CELL, min_size=width, max_size=width)) for _ in range(height + 1)]
    columns, *others = rows
    lines = markdown_table(columns, others).split("\n")
    assert [read_line(line) for line in (lines[0], *lines[2:])] == rows


def test_words_stand_to_the_left_and_figures_to_the_right():
    made = markdown_table(["name", "kind", "ms"], [["a", "b", "1"]], words=2)
    assert made == "| name | kind | ms |\n| --- | --- | ---: |\n| a | b | 1 |"


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"expected 2 cells in a row, got 1: \['c'\]"):
        markdown_table(["a", "b"], [["c"]])
