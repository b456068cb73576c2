"""The data types: what they accept, what they refuse, and in which words."""

from __future__ import annotations

import copy
import dataclasses
import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from blockcache.runtime.errors import ConfigError
from blockcache.runtime.plan import (
    AXES,
    Alignment,
    Dim,
    Preset,
    Schedule,
    Segment,
    Sizes,
    TensorSpec,
)
from blockcache.runtime.provenance import Provenance

SIZES = Sizes(batch=2, height=24, width=40, tokens=7)

sizes = st.builds(Sizes, **{axis: st.integers(1, 100) for axis in AXES})

dims = st.builds(
    lambda number, over, axes: Dim(Fraction(number, over), tuple(sorted(axes))),
    st.integers(1, 10_000),
    st.integers(1, 64),
    st.lists(st.sampled_from(AXES), max_size=4),
)


@given(sizes)
def test_sizes_survive_being_written_and_are_the_same_key(made):
    assert list(made.to_json()) == list(AXES)
    assert Sizes.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert {made: "program"}[dataclasses.replace(made)] == "program"


@given(sizes, st.integers(1, 8), st.booleans())
def test_guidance_runs_every_image_twice(made, images, guided):
    several = made.for_images(images, guided=guided)
    assert several.batch == images * (2 if guided else 1)
    assert dataclasses.replace(several, batch=made.batch) == made


@pytest.mark.parametrize("size", [0, -1, 65_537, 10**9, 16.0, "16", None, True])
def test_a_size_that_is_none_is_refused_by_name(size):
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(SIZES, height=size)
    assert str(caught.value) == (f"Expected a height of 1 to 65536, a whole number; got {size!r}.")


@pytest.mark.parametrize("content", [None, [2, 16, 16, 7], {"batch": 2}, "sizes"])
def test_sizes_without_a_value_for_every_axis_are_refused(content):
    with pytest.raises(ConfigError, match="Expected sizes with a value for each of"):
        Sizes.from_json(content)
    with pytest.raises(ConfigError, match="Expected sizes with a value for each of"):
        Sizes.from_json({**SIZES.to_json(), "depth": 3})


@given(dims)
def test_a_dimension_survives_being_written_and_read(dim):
    assert Dim.parse(str(dim)) == dim


@given(dims, sizes)
def test_a_dimension_is_its_monomial_or_an_error(dim, sizes):
    exact = dim.coefficient * int(np.prod([sizes.along(axis) for axis in dim.axes], dtype=np.int64))
    if exact.denominator == 1:
        assert dim.value(sizes) == exact
    else:
        with pytest.raises(ConfigError, match="must be a whole number"):
            dim.value(sizes)


@pytest.mark.parametrize(
    ("text", "value"),
    [(320, 320), ("320", 320), ("8*batch", 16), ("height*width/16", 60), ("2*tokens*batch", 28)],
)
def test_dimensions_read_as_they_are_written_by_hand(text, value):
    assert Dim.parse(text).value(SIZES) == value


def test_the_order_of_axes_in_the_text_does_not_matter():
    assert Dim.parse("width*batch") == Dim.parse("batch*width")


@pytest.mark.parametrize("text", ["", "height/", "-1", "height+1", "height/2/2", 1.5, True, "a b"])
def test_what_is_no_dimension_is_refused_with_an_example(text):
    with pytest.raises(ConfigError) as caught:
        Dim.parse(text)
    assert str(caught.value) == (f"Expected a dimension such as 'height*width/16', got {text!r}.")


@pytest.mark.parametrize("text", ["depth", "2**batch", "**"])
def test_an_unknown_axis_is_refused_with_the_axes_there_are(text):
    with pytest.raises(ConfigError, match=r"depends on \('batch', 'height', 'width', 'tokens'\)"):
        Dim.parse(text)


@pytest.mark.parametrize("text", [0, "0*batch"])
def test_a_dimension_of_zero_is_refused(text):
    with pytest.raises(ConfigError, match="A dimension is positive; got the coefficient 0"):
        Dim.parse(text)


def test_a_dimension_over_zero_is_refused():
    with pytest.raises(ConfigError):
        Dim.parse("height/0")


def test_a_fractional_dimension_says_what_to_do():
    with pytest.raises(ConfigError) as caught:
        Dim.parse("height/16").value(SIZES)
    text = str(caught.value)
    assert "height/16 must be a whole number; it is 3/2" in text
    assert "Choose sizes divisible by the model's downsampling factor." in text


def spec(name="x", dtype="float32", shape=("batch", 4, "height", "width/2")):
    return TensorSpec(name, dtype, tuple(Dim.parse(size) for size in shape))


def test_a_tensor_knows_its_shape_and_bytes():
    assert spec().shape(SIZES) == (2, 4, 24, 20)
    assert spec().bytes(SIZES) == 4 * 2 * 4 * 24 * 20
    assert spec(dtype="bfloat16").bytes(SIZES) == 2 * 2 * 4 * 24 * 20
    assert spec(shape=()).bytes(SIZES) == 4


def test_an_unknown_dtype_is_refused_by_the_tensors_name():
    with pytest.raises(ConfigError, match=r"Tensor 'x': expected a dtype of .*, got 'float8'"):
        spec(dtype="float8")


@pytest.mark.parametrize(("role", "block"), [("trunk", 0), ("block", None)])
def test_a_block_and_only_a_block_has_an_index(role, block):
    with pytest.raises(ConfigError, match="Segment 's': a block, and only a block, has an index"):
        Segment("s", role, "s.onnx", (), (), block)


def test_an_unknown_role_is_refused():
    with pytest.raises(ConfigError, match="Segment 's': role 'head' is none of"):
        Segment("s", "head", "s.onnx", (), ())


def table(*rows):
    return np.array([[mark == "x" for mark in row] for row in rows])


def test_a_schedule_knows_its_size_and_its_work():
    schedule = Schedule(table("xx", "x.", "..", ".x"))
    assert (schedule.steps, schedule.blocks) == (4, 2)
    assert schedule.computed_fraction() == 4 / 8
    assert schedule.computed_fraction(np.array([3, 1])) == (2 * 3 + 2 * 1) / (4 * 4)


def test_the_uncached_schedule_computes_everything():
    assert Schedule.uncached(3, 5).recompute.all()
    assert Schedule.uncached(3, 5).computed_fraction() == 1.0


def test_a_schedule_that_reuses_at_step_0_names_the_blocks():
    with pytest.raises(ConfigError) as caught:
        Schedule(table("x..", "xxx"))
    assert str(caught.value) == (
        "Step 0 must recompute every block, there is nothing to reuse yet; "
        "blocks [1, 2] are reused there."
    )


@pytest.mark.parametrize(
    "wrong", [np.ones((2, 2)), np.ones(2, bool), np.ones((0, 2), bool), np.ones((2, 0), bool)]
)
def test_a_schedule_is_a_boolean_table(wrong):
    with pytest.raises(ConfigError, match=r"A schedule is a boolean table \[steps, blocks\]; got"):
        Schedule(wrong)


def test_a_schedule_cannot_be_changed_from_outside():
    source = table("xx", "x.")
    schedule = Schedule(source)
    source[1] = True
    assert not schedule.recompute[1, 1]
    with pytest.raises(ValueError, match="read-only"):
        schedule.recompute[1, 1] = True


def test_a_late_start_recomputes_all_first_and_keeps_the_rest():
    started = Schedule(table("xx", "x.", "..", ".x")).started_at(2)
    assert (started.recompute == table("xx", ".x")).all()


def test_the_identity_alignment_leaves_outputs_alone():
    for outputs in (1, 2):
        alignment = Alignment.identity(3, (4, 8), outputs)
        assert alignment.outputs == outputs
        assert [t.shape for t in alignment.tables] == [(3, outputs + 1, 4), (3, outputs + 1, 8)]
        for rows in alignment.tables:
            assert (rows[:, 0] == 1).all()
            assert (rows[:, 1:] == 0).all()


@pytest.mark.parametrize(
    "shapes", [[(3, 4)], [(3, 1, 4)], [(3, 4, 4)], [(3, 2, 4), (3, 3, 4)], [(3, 2, 4), (3, 4)]]
)
def test_alignment_tables_of_wrong_shapes_are_refused(shapes):
    with pytest.raises(ConfigError, match=r"Alignment tables are float32 \[S, 2 or 3, C\], alike"):
        Alignment(tuple(np.zeros(shape, np.float32) for shape in shapes))


def test_alignment_tables_are_float32():
    with pytest.raises(ConfigError, match="Alignment tables are float32"):
        Alignment((np.zeros((3, 2, 4)),))


def test_an_alignment_may_change_reused_outputs_only():
    schedule = Schedule(table("x", ".", "x"))
    tables = Alignment.identity(3, (4,)).tables
    tables[0][1] = 0.7
    Alignment(tables).check(schedule)
    for row, value in ((0, 1.1), (1, 0.1)):
        changed = Alignment.identity(3, (4,)).tables
        changed[0][2, row, 3] = value
        with pytest.raises(ConfigError, match="Alignment of block 0 changes a recomputed output"):
            Alignment(changed).check(schedule)


def test_an_alignment_of_other_steps_is_refused():
    with pytest.raises(ConfigError, match="block 0 has 4 steps, the schedule has 3"):
        Alignment.identity(4, (4,)).check(Schedule.uncached(3, 1))


def preset(**changes):
    values = {
        "name": "ddim-3",
        "solver": {},
        "schedule": Schedule.uncached(3, 2),
        "alignment": Alignment.identity(3, (4, 8)),
        "time_tables": {"row": np.zeros((3, 5), np.float32)},
    }
    return Preset(**{**values, **changes})


@pytest.mark.parametrize("name", ["dpm-20-d0.5", "a", "A_b.c"])
def test_plain_preset_names_are_taken(name):
    assert preset(name=name).name == name


@pytest.mark.parametrize("name", ["", "../up", "a/b", "a b", ".hidden", "-x", "ü"])
def test_a_preset_name_that_is_no_file_name_is_refused(name):
    with pytest.raises(ConfigError, match="A preset's name is made of letters, digits"):
        preset(name=name)


def test_a_preset_whose_parts_disagree_is_refused():
    with pytest.raises(ConfigError, match="2 blocks in the schedule, 1 in the alignment"):
        preset(alignment=Alignment.identity(3, (4,)))
    with pytest.raises(ConfigError, match="block 0 has 4 steps, the schedule has 3"):
        preset(alignment=Alignment.identity(4, (4, 8)))
    with pytest.raises(ConfigError, match=r"'row' has 2 rows, expected one a step \(3\)"):
        preset(time_tables={"row": np.zeros((2, 5), np.float32)})


# -- values ----------------------------------------------------------------------------------------

recomputes = hnp.arrays(np.bool_, st.tuples(st.integers(1, 6), st.integers(1, 4)))


@st.composite
def presets(draw):
    """Schedule, alignment and time tables that fit together."""
    table = draw(recomputes)
    table[0] = True
    rows = draw(st.sampled_from([2, 3]))
    alignment = Alignment.identity(len(table), (3,) * table.shape[1], rows - 1)
    for k, coefficients in enumerate(alignment.tables):
        coefficients[~table[:, k]] = draw(st.floats(-2, 2, width=32))
    times = {
        "time_0": draw(hnp.arrays(np.float32, (len(table), 2), elements=st.floats(0, 1, width=32)))
    }
    solver = {"solver": "dpm", "steps": len(table)}
    scale = draw(st.floats(1, 9))
    return Preset("p", solver, Schedule(table), alignment, times, scale, Provenance(kind="budget"))


@given(presets())
def test_a_preset_equals_its_copy(made):
    twin = copy.deepcopy(made)
    assert twin == made
    assert twin.schedule == made.schedule
    assert twin.alignment == made.alignment
    assert hash(twin.schedule) == hash(made.schedule)
    assert len({twin.schedule, made.schedule}) == 1


@given(presets(), st.data())
def test_a_preset_differs_where_any_part_does(made, data):
    steps, blocks = made.schedule.steps, made.schedule.blocks
    wider = tuple(np.insert(table, 0, 0.5, axis=2) for table in made.alignment.tables)
    wider = Alignment.identity(steps, tuple(t.shape[2] for t in wider), made.alignment.outputs)
    changes = {
        "name": "other",
        "solver": {"solver": "ddim", "steps": steps},
        "alignment": wider,
        "time_tables": {"time_0": made.time_tables["time_0"] + np.float32(1)},
        "guidance_scale": made.guidance_scale + 1,
        "provenance": Provenance(kind="latency"),
    }
    name = data.draw(st.sampled_from(list(changes)))
    assert dataclasses.replace(made, **{name: changes[name]}) != made
    assert made != "a preset"
    assert made.schedule != Schedule.uncached(steps + 1, blocks)
    assert made.alignment != made.alignment.tables


@given(recomputes, recomputes)
def test_schedules_are_equal_where_their_tables_are(one, other):
    one[0], other[0] = True, True
    assert (Schedule(one) == Schedule(other)) is np.array_equal(one, other)


def test_values_print_in_one_line():
    table = np.array([[True, True], [False, True], [False, False]])
    schedule, alignment = Schedule(table), Alignment.identity(3, (4, 4))
    preset = Preset("dpm-3-x2", {}, schedule, alignment, {})
    assert repr(schedule) == "Schedule(3 steps, 2 blocks, 50 % computed)"
    assert repr(alignment) == "Alignment(2 blocks, the last output)"
    assert repr(preset) == "Preset('dpm-3-x2', 3 steps, 2 blocks, 50 % computed)"


def test_alignments_and_presets_refuse_to_hash():
    alignment = Alignment.identity(1, (4,))
    preset = Preset("p", {}, Schedule.uncached(1, 1), alignment, {})
    for value, name in ((alignment, "Alignment"), (preset, "Preset")):
        with pytest.raises(TypeError, match=f"unhashable type: '{name}'"):
            hash(value)
