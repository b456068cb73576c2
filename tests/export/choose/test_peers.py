"""Other cachers' schedules, by hand and by property."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from blockcache.export.choose.peers import deepcache, fixed_interval, read_table, smoothcache
from blockcache.export.choose.schedule import threshold
from blockcache.runtime import ConfigError

# Multiples of 1/64: their sums, and means over 1, 2 or 4 blocks, are exact in float64.
changes = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 12), st.sampled_from([1, 2, 4])),
    elements=st.integers(0, 128).map(lambda count: count / 64),
)
alphas = st.integers(0, 256).map(lambda count: count / 64)
counts = st.integers(1, 12)


def paths(down, up, middle=1):
    """Module paths of blocks: of each (stage, number) in execution order."""
    return [
        *(f"down_blocks.{stage}.attentions.{i}" for stage, count in down for i in range(count)),
        *(f"mid_block.attentions.{i}" for i in range(middle)),
        *(f"up_blocks.{stage}.attentions.{i}" for stage, count in up for i in range(count)),
    ]


SD15 = paths([(0, 2), (1, 2), (2, 2)], [(1, 3), (2, 3), (3, 3)])
SDXL = paths([(1, 2), (2, 2)], [(0, 3), (1, 3)])


# -- fixed interval --------------------------------------------------------------------------------


def test_a_fixed_interval_by_hand():
    marks = fixed_interval(7, 2, 3).recompute.astype(int)
    assert marks.T.tolist() == [[1, 0, 0, 1, 0, 0, 1]] * 2


@given(counts, counts, counts)
def test_an_interval_recomputes_all_blocks_once_an_interval(steps, blocks, interval):
    recompute = fixed_interval(steps, blocks, interval).recompute
    assert recompute.shape == (steps, blocks)
    assert (recompute == recompute[:, :1]).all()
    assert recompute[:, 0].sum() == -(-steps // interval)
    assert recompute[::interval].all()


@pytest.mark.parametrize(
    "make", [lambda n: fixed_interval(4, 2, n), lambda n: deepcache(4, SD15, n)]
)
def test_an_interval_of_nothing_is_refused(make):
    with pytest.raises(ConfigError) as caught:
        make(0)
    assert str(caught.value) == "Expected an interval of 1 or more steps, got 0."


# -- DeepCache -------------------------------------------------------------------------------------


def always_run(names, interval=5):
    """The paths that run at every of 12 steps; the others are checked to keep the interval."""
    recompute = deepcache(12, names, interval).recompute
    always = recompute.all(axis=0)
    for column in recompute[:, ~always].T:
        assert np.flatnonzero(column).tolist() == list(range(0, 12, interval))
    return {name for name, runs in zip(names, always, strict=True) if runs}


def test_deepcache_keeps_the_blocks_of_the_highest_resolution():
    assert always_run(SD15) == set(paths([(0, 2)], [(3, 3)], middle=0))


def test_deepcache_caches_every_block_of_a_model_with_none_at_the_highest_resolution():
    """SDXL's stages at full resolution, down 0 and up 2, are convolutions alone."""
    assert always_run(SDXL) == set()


def test_deepcache_always_runs_a_controlnet():
    names = [f"controlnet.0.{SD15[0]}", "controlnet.0.mid_block.attentions.0", *SD15]
    assert deepcache(4, names, 2).recompute[:, :2].all()
    np.testing.assert_array_equal(
        deepcache(4, names, 2).recompute[:, 2:], deepcache(4, SD15, 2).recompute
    )


def test_deepcache_works_on_blocks_of_one_side_only():
    assert always_run(["mid_block.attentions.0"]) == set()
    assert always_run(paths([(0, 1), (1, 1)], [])) == {"down_blocks.0.attentions.0"}


@given(counts, counts)
def test_deepcache_runs_every_block_at_every_interval(steps, interval):
    recompute = deepcache(steps, SD15, interval).recompute
    assert recompute.shape == (steps, len(SD15))
    assert recompute[::interval].all()
    assert (interval == 1) == recompute.all() or steps == 1


# -- SmoothCache -----------------------------------------------------------------------------------


def test_a_hand_worked_example_of_smoothcache():
    """Mean change 0.25 a step, alpha 0.6: reuse at 0.25 and 0.5, recompute at 0.75."""
    change = np.array([[0.0, 0.0]] + [[0.5, 0.0]] * 6)
    schedule = smoothcache(change, 0.6)
    assert schedule.recompute.astype(int).T.tolist() == [[1, 0, 0, 1, 0, 0, 1]] * 2


def test_smoothcache_looks_no_further_ahead_than_it_may():
    schedule = smoothcache(np.zeros((9, 1)), 1.0, lookahead=3)
    assert np.flatnonzero(schedule.recompute[:, 0]).tolist() == [0, 4, 8]


@given(changes)
def test_smoothcache_with_alpha_0_recomputes_every_step(change):
    assert smoothcache(change, 0).recompute.all()


@given(changes)
def test_smoothcache_without_lookahead_recomputes_every_step(change):
    assert smoothcache(change, 1e9, lookahead=0).recompute.all()


@given(changes, alphas, st.integers(0, 5))
def test_smoothcache_decides_alike_for_all_blocks_and_keeps_both_limits(change, alpha, lookahead):
    recompute = smoothcache(change, alpha, lookahead).recompute
    assert (recompute == recompute[:, :1]).all()
    ran = np.flatnonzero(recompute[:, 0])
    for start, end in zip(ran, [*ran[1:], len(change)], strict=True):
        reused = change[start + 1 : end].mean(axis=1).sum() if end > start + 1 else 0.0
        assert end - start - 1 <= lookahead
        assert reused < alpha or end == start + 1
        if end < len(change):  # it ran again for one of the two reasons
            reached = change[start + 1 : end + 1].mean(axis=1).sum() >= alpha
            assert reached or end - start > lookahead


@given(changes, alphas)
def test_smoothcache_without_a_limit_ahead_is_eq_7_on_the_mean(change, alpha):
    """But for equality, where eq. 7 still reuses: half a unit of the grid lower, they agree."""
    mean = change.mean(axis=1, keepdims=True)
    ours = threshold(mean, max(alpha - 1 / 512, 0.0)).recompute[:, 0]
    theirs = smoothcache(change, alpha, lookahead=len(change)).recompute[:, 0]
    if alpha > 0:
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("alpha", "lookahead"), [(-0.1, 3), (float("nan"), 3), (0.1, -1)])
def test_smoothcache_refuses_a_negative_limit(alpha, lookahead):
    with pytest.raises(ConfigError) as caught:
        smoothcache(np.zeros((2, 1)), alpha, lookahead)
    assert str(caught.value) == (
        f"Expected alpha and lookahead of 0 or more, got {alpha} and {lookahead}."
    )


# -- a table of one's own --------------------------------------------------------------------------


@given(st.data(), counts, counts)
def test_a_table_is_read_as_it_was_written(tmp_path_factory, data, steps, blocks):
    table = data.draw(hnp.arrays(np.int64, (steps, blocks), elements=st.integers(0, 1)))
    table[0] = 1
    path = tmp_path_factory.mktemp("table") / "t.json"
    path.write_text(json.dumps(table.tolist()))
    np.testing.assert_array_equal(read_table(path, steps, blocks).recompute, table)


def test_a_missing_table_is_refused(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read_table(tmp_path / "t.json", 2, 2)
    assert str(caught.value) == (
        f"Expected a schedule at {tmp_path / 't.json'}, found no such file."
    )


@pytest.mark.parametrize("content", [b"", b"[[1, 1], [0]]", b"{", b"\xff"])
def test_a_file_that_is_no_table_is_refused(tmp_path, content):
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_table(path, 2, 2)
    start = f"Expected JSON, S rows of K zeros and ones, in {path}: "
    assert str(caught.value).startswith(start)


WRONG = {
    "[[1, 1]]": "int64 values of shape (1, 2)",
    "[1, 1]": "int64 values of shape (2,)",
    "{}": "object values of shape ()",
    "[[1, 1], [0, 2]]": "int64 values of shape (2, 2)",
    "[[1, 1], [0, 0.5]]": "float64 values of shape (2, 2)",
    '[["1", "1"], ["0", "1"]]': "<U1 values of shape (2, 2)",
    "[[1, 1], [0, null]]": "object values of shape (2, 2)",
}


@pytest.mark.parametrize(("content", "got"), WRONG.items())
def test_a_table_of_other_shape_or_values_is_refused(tmp_path, content, got):
    path = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_table(path, 2, 2)
    assert str(caught.value) == (
        f"Expected 2 rows (steps) of 2 zeros and ones (blocks) in {path}, got {got}."
    )


def test_a_table_that_reuses_at_step_0_is_refused(tmp_path):
    path = tmp_path / "t.json"
    path.write_text("[[1, 0], [1, 1]]")
    with pytest.raises(ConfigError, match=r"Step 0 must recompute every block.*blocks \[1\]"):
        read_table(path, 2, 2)
