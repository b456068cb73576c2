"""Latents are drawn once, depend on all that they should, and survive an interrupt."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from blockcache.runtime import Session
from blockcache.tools.evaluation.options import DrawOptions
from blockcache.tools.evaluation.sampling import Drawings, draw_batch


@pytest.fixture
def drawings_of(compiled, conditions_of, subject_of, tmp_path):
    """``drawings_of(images, **options)`` on the tiny model, all in one folder."""
    model, bundle = compiled("sd")

    def make(images=5, workers=None, **options):
        options = DrawOptions(**{"images": images, "batch": 2, "guidance": 2.0, **options})
        subject = subject_of(model, conditions_of, images)
        return Drawings(make.bundle, subject, options, make.folder, workers)

    make.bundle, make.folder = bundle, tmp_path
    make.preset = bundle.preset("ddim-4")
    return make


def test_a_second_run_draws_nothing_and_reads_the_same(drawings_of):
    heard = []
    first = drawings_of()
    assert first.missing(drawings_of.preset) == 5
    latents = first.draw(drawings_of.preset, heard.append)
    assert heard == [2, 4, 5]
    assert latents.shape == (5, 4, 16, 16)
    again = drawings_of()
    assert again.missing(drawings_of.preset) == 0
    np.testing.assert_array_equal(again.draw(drawings_of.preset, pytest.fail), latents)


def test_an_interrupted_run_goes_on_where_it_stopped(drawings_of):
    def interrupt(images):
        if images == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drawings_of().draw(drawings_of.preset, interrupt)
    assert drawings_of().missing(drawings_of.preset) == 1


def test_more_images_keep_the_whole_batches_of_before(drawings_of):
    few = drawings_of(4).draw(drawings_of.preset)
    more = drawings_of(6)
    assert more.missing(drawings_of.preset) == 2
    np.testing.assert_array_equal(more.draw(drawings_of.preset)[:4], few)


def test_a_damaged_batch_is_drawn_again(drawings_of, tmp_path):
    latents = drawings_of().draw(drawings_of.preset)
    damaged = next(tmp_path.rglob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    np.testing.assert_array_equal(drawings_of().draw(drawings_of.preset), latents)


class Backwards:
    """Stands in for processes that end in another order."""

    def __init__(self, bundle):
        self.bundle = bundle

    def draw(self, preset, tasks):
        session = Session.open(self.bundle, preset=preset.name, backend="ort")
        for place, task in reversed(list(enumerate(tasks))):
            yield place, draw_batch(session, task)


def test_workers_draw_the_same_in_whatever_order(drawings_of, tmp_path):
    alone = drawings_of().draw(drawings_of.preset)
    drawings_of.folder = tmp_path / "workers"
    heard = []
    shared = drawings_of(workers=Backwards(drawings_of.bundle))
    np.testing.assert_array_equal(shared.draw(drawings_of.preset, heard.append), alone)
    assert heard == [1, 3, 5]
    again = drawings_of()  # what they drew is kept
    np.testing.assert_array_equal(again.draw(drawings_of.preset, pytest.fail), alone)


def test_what_latents_depend_on_is_in_the_key(drawings_of):
    base, preset = drawings_of(), drawings_of.preset
    recompute = preset.schedule.recompute.copy()
    recompute[2] = False
    schedule = dataclasses.replace(preset.schedule, recompute=recompute)
    solver = {**preset.solver, "prediction": "epsilon"}
    tables = {name: table + 1 for name, table in preset.time_tables.items()}
    keys = {
        base.key(preset),
        base.key(dataclasses.replace(preset, schedule=schedule)),
        base.key(dataclasses.replace(preset, solver=solver)),
        base.key(dataclasses.replace(preset, time_tables=tables)),
        drawings_of(backend="ort").key(preset),
        drawings_of(guidance=3.0).key(preset),
    }
    manifest = drawings_of.bundle.manifest
    name = manifest.segments[0].file
    altered = {**manifest.files, name: dataclasses.replace(manifest.files[name], sha256="0")}
    drawings_of.bundle = dataclasses.replace(
        drawings_of.bundle, manifest=dataclasses.replace(manifest, files=altered)
    )
    keys.add(drawings_of().key(preset))
    assert len(keys) == 7


def test_other_presets_of_the_bundle_do_not_matter(drawings_of):
    key, manifest = drawings_of().key(drawings_of.preset), drawings_of.bundle.manifest
    files = {**manifest.files, "presets/new.safetensors": next(iter(manifest.files.values()))}
    drawings_of.bundle = dataclasses.replace(
        drawings_of.bundle, manifest=dataclasses.replace(manifest, files=files)
    )
    assert drawings_of().key(drawings_of.preset) == key


def test_the_presets_own_guidance_counts_where_none_is_given(drawings_of):
    weaker = dataclasses.replace(drawings_of.preset, guidance_scale=2.0)
    given = drawings_of(guidance=None)
    assert given.guidance(weaker) == 2.0
    assert given.guidance(drawings_of.preset) == drawings_of.preset.guidance_scale != 2.0
    assert given.key(weaker) != given.key(drawings_of.preset)


def test_another_seed_is_drawn_anew_and_differs(drawings_of):
    latents = drawings_of().draw(drawings_of.preset)
    other = drawings_of(seed=1)
    assert other.missing(drawings_of.preset) == 5
    redrawn = other.draw(drawings_of.preset)
    assert np.abs(redrawn - latents).min() >= 0
    assert not np.array_equal(redrawn, latents)
