"""Groups, costs and pairings of a bundle's presets."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace

import numpy as np
import pytest

from blockcache.runtime import ConfigError, Schedule
from blockcache.runtime.provenance import Provenance
from blockcache.tools.evaluation.contest import (
    Contestant,
    Group,
    image_flops,
    make_groups,
    pairings,
)

HALF = np.tile([[True, True], [False, False]], (2, 1))
NINE = np.concatenate([[[True, True]], np.zeros((8, 2), np.bool_)])
FIRST = np.array([[True, True], [True, False], [True, False], [True, False]])


@pytest.fixture
def bundle(preset_of, presets_only):
    return presets_only(
        [
            preset_of("dpm-4-half", 4, HALF, kind="threshold", value=0.5),
            preset_of("dpm-3", 3),
            preset_of("dpm-4", 4),
            preset_of("dpm-2", 2),
            preset_of(
                "dpm-4-half-h", 4, HALF, kind="threshold", value=0.5, alignment="history"
            ),
            preset_of("dpm-4-x", 4, FIRST, kind="budget", alignment="history"),
            preset_of("dpm-9", 9),
            preset_of("dpm-9-t", 9, NINE, kind="threshold-speedup", value=1.2),
            preset_of("dpm-9-c", 9, NINE, kind="change-budget", value=1.2),
            preset_of("ddim-4-half", 4, HALF, "ddim", kind="interval"),
            preset_of("euler-3", 3, solver="euler"),
            preset_of("euler-2", 2, solver="euler"),
        ]
    )  # fmt: skip


def test_a_group_has_a_reference_fewer_steps_and_cached_presets(bundle):
    groups = {group.name: group for group in make_groups(bundle)}
    assert list(groups) == ["dpm-4", "dpm-9", "ddim-4", "euler-3"]
    dpm = groups["dpm-4"]
    assert dpm.reference.name == "dpm-4"
    assert [(contestant.name, contestant.method) for contestant in dpm.others] == [
        ("dpm-3", "fewer steps"),
        ("dpm-2", "fewer steps"),
        ("dpm-4-x", "budget + history"),
        ("dpm-4-half", "threshold"),
        ("dpm-4-half-h", "threshold + history"),
    ]
    assert [contestant.name for contestant in groups["euler-3"].contestants] == [
        "euler-3",
        "euler-2",
    ]


def test_a_missing_reference_is_made_from_a_cached_preset(bundle):
    ddim = make_groups(bundle, ["ddim-4-half"])[0]
    assert ddim.reference.name == "ddim-4-uncached"
    assert ddim.reference.preset.schedule.recompute.all()
    assert ddim.reference.preset.provenance == Provenance(kind="uncached")


def test_only_named_presets_enter_but_references_are_added(bundle):
    (group,) = make_groups(bundle, ["dpm-4-x"])
    assert [contestant.name for contestant in group.contestants] == ["dpm-4", "dpm-4-x"]


def test_flops_count_every_launch(bundle):
    assert image_flops(bundle, bundle.preset("dpm-3")) == (7 + 3 * 200, 3 * 100)
    assert image_flops(bundle, bundle.preset("dpm-4-half")) == (7 + 4 * 100 + 200, 200)
    assert image_flops(bundle, bundle.preset("dpm-4-x")) == (7 + 4 * 100 + 120 + 70, 190)


def test_pairings_are_those_of_the_papers_claims(bundle):
    found = {(p.subject.name, p.against, p.other.name) for p in pairings(make_groups(bundle)[0])}
    assert found == {
        ("dpm-3", "uncached", "dpm-4"),
        ("dpm-2", "uncached", "dpm-4"),
        ("dpm-4-half", "uncached", "dpm-4"),
        ("dpm-4-half", "fewer steps", "dpm-3"),
        ("dpm-4-half-h", "uncached", "dpm-4"),
        ("dpm-4-half-h", "fewer steps", "dpm-3"),
        ("dpm-4-half-h", "unaligned", "dpm-4-half"),
        ("dpm-4-x", "uncached", "dpm-4"),
        ("dpm-4-x", "fewer steps", "dpm-3"),
        ("dpm-4-x", "threshold", "dpm-4-half-h"),
    }


def test_a_threshold_is_one_however_its_delta_was_chosen(bundle):
    group = make_groups(bundle)[1]
    methods = {contestant.name: contestant.method for contestant in group.others}
    assert methods["dpm-9-t"] == "threshold"
    assert methods["dpm-9-c"] == "budget by change"
    found = {(p.subject.name, p.against, p.other.name) for p in pairings(group)}
    assert ("dpm-9-c", "threshold", "dpm-9-t") in found
    assert not any(p.subject.name == p.other.name for p in pairings(group))


def test_on_any_grid_presets_of_one_solver_compete(preset_of, presets_only):
    """The reference is the run on the scheduler's own grid, whichever was compiled first."""

    def on_grid(name, steps, recompute=None, **policy):
        made = preset_of(name, steps, recompute, **policy)
        return dataclasses.replace(made, solver={**made.solver, "grid": {"name": "auto"}})

    policy = {"kind": "joint", "value": 1.5, "replaced_steps": 4, "alignment": "history"}
    bundle = presets_only(
        [
            on_grid("dpm-auto-4", 4),
            preset_of("dpm-4", 4),
            preset_of("dpm-3", 3),
            on_grid("dpm-auto-3", 3),
            on_grid("dpm-4-x1.5", 3, THIRD, **policy),
        ]
    )
    (group,) = make_groups(bundle, any_grid=True)
    assert [(c.name, c.method) for c in group.contestants] == [
        ("dpm-4", "uncached"),
        ("dpm-3", "fewer steps"),
        ("dpm-auto-3", "fewer steps"),
        ("dpm-auto-4", "uncached, other grid"),
        ("dpm-4-x1.5", "steps and reuse together + history"),
    ]
    found = {(p.subject.name, p.against, p.other.name) for p in pairings(group)}
    assert {other for subject, against, other in found if subject == "dpm-4-x1.5"} == {
        "dpm-4", "dpm-3", "dpm-auto-3",
    }  # fmt: skip
    own = group.own_uncached(group.contestants[4])
    assert (own.name, own.schedule.recompute.all()) == ("dpm-4-x1.5-uncached", True)
    assert group.own_uncached(group.reference) is None
    assert len(make_groups(presets_only([bundle.preset(n) for n in ("dpm-4", "dpm-auto-4")]))) == 2


@pytest.fixture
def with_joint(preset_of, presets_only):
    """Presets that take the place of 4 steps with fewer, one of them without any caching."""
    policy = {"kind": "joint", "value": 1.5, "replaced_steps": 4}
    return presets_only(
        [
            preset_of("dpm-4", 4),
            preset_of("dpm-3", 3),
            preset_of("dpm-4-x1.5-history", 3, THIRD, **policy, alignment="history"),
            preset_of("dpm-4-x1.9", 2, **policy),
        ]
    )


def test_a_joint_preset_competes_where_it_was_asked_to(with_joint):
    (group,) = make_groups(with_joint)
    assert group.name == "dpm-4"
    assert [(contestant.name, contestant.method) for contestant in group.contestants] == [
        ("dpm-4", "uncached"),
        ("dpm-3", "fewer steps"),
        ("dpm-4-x1.9", "fewer steps"),
        ("dpm-4-x1.5-history", "steps and reuse together + history"),
    ]
    assert ("dpm-4-x1.5-history", "fewer steps", "dpm-3") in {
        (p.subject.name, p.against, p.other.name) for p in pairings(group)
    }


def test_a_joint_preset_alone_has_nothing_to_be_compared_with(preset_of, presets_only):
    policy = {"kind": "joint", "value": 1.5, "replaced_steps": 4, "alignment": "history"}
    bundle = presets_only([preset_of("dpm-4-x1.5-history", 3, THIRD, **policy)])
    with pytest.raises(ConfigError) as caught:
        make_groups(bundle)
    assert str(caught.value) == (
        "Expected an uncached preset of 4 steps beside 'dpm-4-x1.5-history', which takes its "
        "place with 3; there is none. Compile one with it."
    )


THIRD = np.array([[True, True], [True, False], [True, True]])


@pytest.fixture
def steps_and_caching(preset_of, presets_only):
    """Schedules of 4, 3 and 2 steps around ``dpm-4``, and what does not belong to it.

    By cost alone, ``dpm-3-x`` is nearest to the threshold of four steps.
    """
    threshold = {"kind": "threshold", "value": 0.5}
    return presets_only(
        [
            preset_of("dpm-9", 9),
            preset_of("dpm-9-t", 9, NINE, **threshold),
            preset_of("dpm-4-half", 4, HALF, **threshold),
            preset_of("dpm-4-x-h", 4, FIRST, kind="budget", alignment="history"),
            preset_of("dpm-4", 4),
            preset_of("dpm-2", 2),
            preset_of("dpm-3", 3),
            preset_of("dpm-3-x", 3, THIRD, kind="budget"),
            preset_of("dpm-3-x-h", 3, THIRD, kind="budget", alignment="history"),
            preset_of("dpm-3-t", 3, NINE[:3], **threshold),
            preset_of("dpm-2-t", 2, HALF[:2], **threshold),
            preset_of("ddim-3", 3, solver="ddim"),
        ]
    )


def test_with_a_reference_fewer_steps_and_caching_compete(steps_and_caching):
    (group,) = make_groups(steps_and_caching, reference="dpm-4")
    assert (group.name, group.reference.name) == ("dpm-4", "dpm-4")
    assert [(contestant.name, contestant.method) for contestant in group.others] == [
        ("dpm-3", "fewer steps"),
        ("dpm-2", "fewer steps"),
        ("dpm-4-x-h", "budget + history"),
        ("dpm-3-x", "fewer steps + budget"),
        ("dpm-3-x-h", "fewer steps + budget + history"),
        ("dpm-3-t", "fewer steps + threshold"),
        ("dpm-2-t", "fewer steps + threshold"),
        ("dpm-4-half", "threshold"),
    ]


def test_schedules_are_compared_at_the_same_step_count_only(steps_and_caching):
    (group,) = make_groups(steps_and_caching, reference="dpm-4")
    found = {(p.subject.name, p.against, p.other.name) for p in pairings(group)}
    assert {pair for pair in found if pair[1] not in ("uncached", "fewer steps")} == {
        ("dpm-3-x", "threshold", "dpm-3-t"),
        ("dpm-3-x-h", "unaligned", "dpm-3-x"),
    }
    assert {p.other.name for p in pairings(group) if p.against == "uncached"} == {"dpm-4"}
    assert ("dpm-3-x", "fewer steps", "dpm-3") in found
    assert ("dpm-2-t", "fewer steps", "dpm-2") in found
    assert not any(
        p.against == "fewer steps" and p.subject.name == "dpm-2" for p in pairings(group)
    )


def test_a_table_that_looks_alike_at_other_steps_is_no_plain_one():
    """Two tables of the same bytes, by another number of blocks: no real bundle holds both."""
    longer = np.array([[True, True], [True, False], [False, False]])

    def contestant(name, table, **policy):
        preset = SimpleNamespace(
            name=name, schedule=Schedule(table), provenance=Provenance(**policy)
        )
        return Contestant(preset, name, 2.0, 1.0)

    aligned = contestant("aligned", longer, kind="budget", alignment="history")
    shorter = contestant("shorter", longer.reshape(2, 3), kind="budget")
    assert aligned.schedule == shorter.schedule
    for plain, expected in (
        (shorter, []),
        (contestant("plain", longer, kind="budget"), [("aligned", "plain")]),
    ):
        group = Group("g", contestant("g", np.ones((3, 2), np.bool_)), (aligned, plain))
        unaligned = [pair for pair in pairings(group) if pair.against == "unaligned"]
        assert [(pair.subject.name, pair.other.name) for pair in unaligned] == expected


def test_named_presets_around_a_reference_need_not_name_it(steps_and_caching):
    (group,) = make_groups(steps_and_caching, ["dpm-3-x-h", "dpm-2"], "dpm-4")
    assert [contestant.name for contestant in group.contestants] == ["dpm-4", "dpm-2", "dpm-3-x-h"]
    (group,) = make_groups(steps_and_caching, ["dpm-4", "dpm-2"], "dpm-4")
    assert [contestant.name for contestant in group.contestants] == ["dpm-4", "dpm-2"]


@pytest.mark.parametrize("name", ["dpm-4-half", "dpm-5"])
def test_a_reference_is_an_uncached_preset_of_the_bundle(steps_and_caching, name):
    message = (
        f"--reference: expected an uncached preset of the bundle, got '{name}'. Uncached presets "
        "there are: dpm-9, dpm-4, dpm-2, dpm-3, ddim-3."
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_groups(steps_and_caching, reference=name)


def test_a_bundle_of_cached_presets_has_no_reference(preset_of, presets_only):
    bundle = presets_only([preset_of("dpm-4-half", 4, HALF, kind="interval")])
    with pytest.raises(ConfigError, match="Uncached presets there are: none; compile one"):
        make_groups(bundle, reference="dpm-4")


def test_named_presets_that_do_not_compete_are_refused(steps_and_caching):
    names = ["dpm-4", "dpm-3-x", "dpm-9-t", "ddim-3"]
    message = (
        "--reference dpm-4: expected presets of the same solver and solver options with at most 4 "
        "steps, cached if with as many; got dpm-9-t, ddim-3. Leave them out"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_groups(steps_and_caching, names, "dpm-4")


def test_other_options_make_another_solver(preset_of, presets_only):
    karras = preset_of("dpm-3-k", 3)
    karras = dataclasses.replace(karras, solver={**karras.solver, "karras": True})
    bundle = presets_only([preset_of("dpm-4", 4), preset_of("dpm-4-twin", 4), karras])
    (group,) = make_groups(bundle, reference="dpm-4")
    assert group.others == ()
    with pytest.raises(ConfigError, match="got dpm-4-twin, dpm-3-k"):
        make_groups(bundle, ["dpm-4-twin", "dpm-3-k"], "dpm-4")
