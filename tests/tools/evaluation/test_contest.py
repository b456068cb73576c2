"""Groups, costs and pairings of a bundle's presets."""

from __future__ import annotations

import numpy as np
import pytest

from blockcache.tools.evaluation.contest import image_flops, make_groups, pairings

HALF = np.tile([[True, True], [False, False]], (2, 1))
NINE = np.concatenate([[[True, True]], np.zeros((8, 2), np.bool_)])
FIRST = np.array([[True, True], [True, False], [True, False], [True, False]])


@pytest.fixture
def bundle(preset_of, presets_only):
    return presets_only(
        [
            preset_of("dpm-4-half", 4, HALF, kind="threshold", delta=0.5),
            preset_of("dpm-3", 3),
            preset_of("dpm-4", 4),
            preset_of("dpm-2", 2),
            preset_of(
                "dpm-4-half-h", 4, HALF, kind="threshold", delta=0.5, alignment="history"
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
    assert [(entrant.name, entrant.method) for entrant in dpm.others] == [
        ("dpm-3", "fewer steps"),
        ("dpm-2", "fewer steps"),
        ("dpm-4-x", "budget + history"),
        ("dpm-4-half", "threshold"),
        ("dpm-4-half-h", "threshold + history"),
    ]
    assert [entrant.name for entrant in groups["euler-3"].entrants] == ["euler-3", "euler-2"]


def test_a_missing_reference_is_made_from_a_cached_preset(bundle):
    ddim = make_groups(bundle, ["ddim-4-half"])[0]
    assert ddim.reference.name == "ddim-4-uncached"
    assert ddim.reference.preset.schedule.recompute.all()
    assert ddim.reference.preset.policy == {"kind": "uncached"}


def test_only_named_presets_enter_but_references_are_added(bundle):
    (group,) = make_groups(bundle, ["dpm-4-x"])
    assert [entrant.name for entrant in group.entrants] == ["dpm-4", "dpm-4-x"]


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
    methods = {entrant.name: entrant.method for entrant in group.others}
    assert methods["dpm-9-t"] == "threshold"
    assert methods["dpm-9-c"] == "budget by change"
    found = {(p.subject.name, p.against, p.other.name) for p in pairings(group)}
    assert ("dpm-9-c", "threshold", "dpm-9-t") in found
    assert not any(p.subject.name == p.other.name for p in pairings(group))
