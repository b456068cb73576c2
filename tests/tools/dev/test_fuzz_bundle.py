"""Mutations of a bundle: each is refused when it opens, or draws the same picture."""

from __future__ import annotations

import collections
import shutil

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("torch")

from blockcache.export.choose.preset import PresetOptions
from blockcache.export.pipeline import (
    CompileOptions,
    ExportOptions,
    compile_model,
)
from blockcache.runtime import Bundle
from blockcache.tools.dev import fuzz_bundle
from blockcache.tools.dev.bundle_mutations import mutate, resign
from blockcache.tools.dev.fuzz_bundle import CRASH, FOREIGN, LATE, OTHER, REFUSED, SAME, Outcome

MUTATIONS, FLIPS = 150, 60


@pytest.fixture(scope="module")
def bundle(tiny_models, tmp_path_factory):
    """One preset without reuse, one with; a reuse combines two outputs."""
    presets = tuple(PresetOptions.parse(text) for text in ("ddim:3", "dpm:5:every2"))
    options = CompileOptions(presets=presets, export=ExportOptions(outputs=2))
    folder = tmp_path_factory.mktemp("fuzz") / "bundle"
    compile_model(tiny_models("class-conditioned"), folder, options)
    return folder


def test_no_mutation_crashes_or_draws_another_picture_in_silence(bundle):
    outcomes = list(fuzz_bundle.fuzz(bundle, range(MUTATIONS)))
    assert [outcome.seed for outcome in outcomes] == list(range(MUTATIONS))
    assert [outcome for outcome in outcomes if not outcome.allowed] == []
    ends = collections.Counter(outcome.end for outcome in outcomes)
    assert ends[REFUSED] > MUTATIONS / 2, ends
    assert ends[SAME], ends  # order of inputs, names of blocks: nothing depends on them
    assert ends[OTHER], ends  # other weights with hashes that agree: the comparison sees them


def test_every_flipped_bit_of_the_manifest_is_refused(bundle):
    outcomes = list(fuzz_bundle.fuzz(bundle, range(FLIPS), bits=True))
    assert {outcome.end for outcome in outcomes} == {REFUSED}


def test_a_crash_is_an_outcome_and_the_next_mutation_goes_on(bundle, monkeypatch):
    """A worker that is killed at once, as by a crash in an engine library."""
    monkeypatch.setattr(fuzz_bundle.sys, "executable", shutil.which("false"))
    outcomes = list(fuzz_bundle.fuzz(bundle, [4, 5]))
    assert [(o.seed, o.end, o.detail) for o in outcomes] == [
        (4, CRASH, "exit status 1"), (5, CRASH, "exit status 1"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("end", "undetectable", "allowed"),
    [
        (REFUSED, False, True), (SAME, False, True),
        (OTHER, False, False), (OTHER, True, True),
        (LATE, False, False), (LATE, True, True),
        (FOREIGN, True, False), (CRASH, True, False),
    ],
)  # fmt: skip
def test_what_may_end_how(end, undetectable, allowed):
    assert Outcome(0, "", undetectable, end, "").allowed is allowed


def test_signing_again_what_did_not_change_changes_nothing(bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "copy")
    resign(copy)
    assert (copy / "manifest.json").read_bytes() == (bundle / "manifest.json").read_bytes()
    assert Bundle.open(copy).preset_names == ("ddim-3", "dpm-5-every2")


def test_a_seed_always_gives_the_same_mutation(bundle, tmp_path):
    texts = []
    for name in ("a", "b"):
        folders = [shutil.copytree(bundle, tmp_path / f"{name}{seed}") for seed in range(10)]
        texts.append([mutate(folder, seed).text for seed, folder in enumerate(folders)])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 10
