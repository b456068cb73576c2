"""The memory planner: live tensors never overlap, and sharing pays."""

from __future__ import annotations

import dataclasses
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockcache.runtime import EmptyBackend, Session
from blockcache.runtime.memory import (
    ALIGNMENT_BYTES,
    Arena,
    Lifetime,
    aligned,
    peak_bytes,
    plan_arena,
)

lifetimes = st.lists(
    st.builds(
        lambda size, first, length: Lifetime(size, first, first + length),
        st.integers(1, 5000),
        st.integers(0, 20),
        st.integers(0, 20),
    ),
    max_size=25,
)


def overlapping(tensors, arena):
    """Pairs that are live at the same time and share a byte."""
    spans = [
        (offset, offset + tensor.bytes)
        for tensor, offset in zip(tensors, arena.offsets, strict=True)
    ]
    return [
        (i, j)
        for i, j in combinations(range(len(tensors)), 2)
        if set(range(tensors[i].first, tensors[i].last + 1))
        & set(range(tensors[j].first, tensors[j].last + 1))
        and spans[i][0] < spans[j][1]
        and spans[j][0] < spans[i][1]
    ]


@given(lifetimes)
def test_tensors_that_live_at_the_same_time_never_overlap(tensors):
    assert overlapping(tensors, plan_arena(tensors)) == []


def test_the_overlap_check_sees_an_overlap():
    tensors = [Lifetime(100, 0, 1), Lifetime(100, 1, 2)]
    assert overlapping(tensors, Arena((0, 0), 256)) == [(0, 1)]


@given(lifetimes)
def test_offsets_are_aligned_and_inside_the_arena(tensors):
    arena = plan_arena(tensors)
    for tensor, offset in zip(tensors, arena.offsets, strict=True):
        assert offset % ALIGNMENT_BYTES == 0
        assert 0 <= offset <= arena.bytes - tensor.bytes


@given(lifetimes)
def test_the_arena_lies_between_the_peak_and_the_sum(tensors):
    arena = plan_arena(tensors)
    assert peak_bytes(tensors) <= arena.bytes <= sum(aligned(t.bytes) for t in tensors)


@given(lifetimes)
def test_the_peak_is_the_most_that_lives_at_one_position(tensors):
    live = [
        sum(aligned(t.bytes) for t in tensors if t.first <= position <= t.last)
        for position in range(41)
    ]
    assert peak_bytes(tensors) == max(live)


def test_a_chain_shares_two_places():
    chain = [Lifetime(256, i, i + 1) for i in range(10)]
    assert plan_arena(chain).bytes == 512


def test_no_tensors_need_no_memory():
    assert plan_arena([]) == Arena((), 0)
    assert peak_bytes([]) == 0


@pytest.mark.parametrize(("count", "rounded"), [(0, 0), (1, 256), (256, 256), (257, 512)])
def test_sizes_are_rounded_up_to_the_alignment(count, rounded):
    assert aligned(count) == rounded


def test_the_boundary_of_a_real_model_shares_memory(compiled):
    _, bundle = compiled("sd")
    report = Session.open(bundle, backend="empty").memory(images=2)
    assert 0 < report.arena < report.boundary_sum
    assert report.arena % ALIGNMENT_BYTES == 0


def test_the_report_counts_what_the_manifest_says(compiled):
    _, bundle = compiled("sd")
    session = Session.open(bundle, backend="empty")
    for images, guided, batch in ((1, True, 2), (3, True, 6), (3, False, 3)):
        sizes = dataclasses.replace(bundle.model.sizes, batch=batch)
        blocks = sum(s.outputs[0].bytes(sizes) for s in bundle.segments if s.role == "block")
        assert session.memory(images, guided).blocks == blocks


class WatchingBackend(EmptyBackend):
    """Engines that keep the addresses they are bound to, by segment."""

    name = "watching"

    def __init__(self):
        super().__init__()
        self.bound = {}

    def load(self, bundle, segment):
        return WatchingEngine(segment.name, self.bound)


class WatchingEngine:
    def __init__(self, name, bound):
        self.name, self.bound = name, bound

    def bind(self, tensors):
        self.bound[self.name] = dict(tensors)
        return lambda: None


def test_no_two_tensors_of_a_segment_share_an_address(compiled):
    """The bound program: what a segment writes overlaps nothing it reads."""
    _, bundle = compiled("sd")
    backend = WatchingBackend()
    session = Session.open(bundle, backend=backend)
    prompt = np.zeros((1, bundle.model.sizes.tokens, 32), np.float32)
    session.denoise(session.noise([0]), prompt, guidance_scale=1)
    assert len(backend.bound) > len(bundle.model.blocks)
    for name, tensors in backend.bound.items():
        spans = sorted((t.pointer, t.pointer + t.bytes) for t in tensors.values())
        for (_, end), (begin, _) in pairwise(spans):
            assert end <= begin, name
