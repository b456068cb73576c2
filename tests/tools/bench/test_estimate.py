"""``blockcache estimate``: a bundle's prediction, through the same door as a user."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("typer")
pytest.importorskip("onnxruntime")
pytest.importorskip("diffusers")

from blockcache.export.costs.roofline import gpu
from blockcache.export.costs.timings import Timings
from blockcache.export.graph.work import Fusion
from blockcache.runtime import ConfigError, Schedule
from blockcache.runtime.run_table import run_table
from blockcache.tools.bench.estimate import estimate, mean_error
from blockcache.tools.bench.host import measure_host
from blockcache.tools.bench.published import PUBLISHED, published_rows
from blockcache.tools.bench.throughput import SharedTimes, asking_probability, throughput
from blockcache.tools.commands.estimate import estimate_facts, estimate_text


@pytest.fixture
def bundle(compiled):
    return compiled("sd")[1]


def test_presets_are_predicted_from_the_segments_they_run(bundle):
    made = estimate(bundle, gpu("a100"), images=2)
    assert made.sizes.batch == 4  # guidance doubles it
    rows = {row.name: row for row in made.presets()}
    assert rows.keys() == set(bundle.preset_names)
    for row in rows.values():  # both recompute everything
        steps = bundle.preset(row.name).schedule.steps
        assert row.image_ms == pytest.approx((made.costs.prompt + steps * made.step_ms) / 2)
        assert (row.speedup, row.computed_fraction) == pytest.approx((1.0, 1.0))
    assert 0 < made.block_share < 1


def test_a_perfect_measurement_has_no_error(bundle):
    made = estimate(bundle, gpu("a100"))
    beside = estimate(bundle, gpu("a100"), measured=made.timings)
    assert beside.step_error == 0
    assert mean_error(beside.rows) == 0
    slow = replace(made.timings, segment_ms={n: 2 * t for n, t in made.timings.segment_ms.items()})
    beside = estimate(bundle, gpu("a100"), measured=slow)
    assert beside.step_error == mean_error(beside.rows) * -1 == -0.5
    facts = estimate_facts(beside)
    assert [row["measured_ms"] for row in facts["presets"]] == pytest.approx(
        [2 * row["image_ms"] for row in facts["presets"]]
    )


def test_the_text_shows_the_error_beside_every_prediction(bundle):
    made = estimate(bundle, gpu("a100"))
    plain = estimate_text(made)
    assert "error" not in plain
    text = estimate_text(estimate(bundle, gpu("a100"), measured=made.timings))
    assert text.count("+0%") == len(made.rows) + len(bundle.preset_names) + 1
    widths = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert set(widths) == {8, 9}  # Markdown tables of one width each


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 10}, "Expected a latent height and width divisible by 4, got 10 x 16."),
        ({"images": 3}, "Expected timings at batch 6"),
    ],
)
def test_what_does_not_fit_is_refused(bundle, changes, message):
    measured = Timings("ort", "cpu", bundle.model.sizes, {"trunk_00": 1.0})
    with pytest.raises(ConfigError, match=re.escape(message)):
        estimate(bundle, gpu("a100"), measured=measured, **changes)


def test_timings_of_another_model_are_refused(bundle):
    measured = Timings("ort", "cpu", bundle.model.sizes, {"trunk_00": 1.0})
    with pytest.raises(ConfigError, match="these timings on cpu are of another model"):
        estimate(bundle, gpu("a100"), measured=measured)


def test_published_figures_are_held_against_bundles_of_their_model_only(bundle):
    assert published_rows(bundle) == []
    facts = replace(bundle.model, name="sd15")
    named = replace(bundle, manifest=replace(bundle.manifest, model=facts))
    rows = published_rows(named)
    assert [row["step_ms"] for row in rows] == [found.step_ms for found in PUBLISHED["sd15"]]
    for row in rows:
        assert row["error"] == pytest.approx(row["predicted_ms"] / row["step_ms"] - 1)


def test_this_machine_is_a_processor_too(bundle):
    """Its figures are measured; what must hold is that it counts as a library on a CPU does."""
    host = measure_host(threads=1, repeats=1)
    assert (host.fusion, host.item_bytes) == (Fusion.NONE, 4)
    assert 1e-4 < host.tflops < 100
    assert 0.1 < host.gb_per_s < 1e4
    assert estimate(bundle, host).step_ms > 0


# -- many requests at once -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_times(compiled):
    return SharedTimes.predict(compiled("sd")[1], gpu("a100"), 3)


def alternating(bundle, steps=6):
    """Every other step reuses all blocks."""
    recompute = np.ones((steps, len(bundle.model.blocks)), np.bool_)
    recompute[1::2] = False
    return Schedule(recompute)


def test_one_request_at_a_time_gains_nothing(bundle, shared_times):
    found = throughput(shared_times, "p", alternating(bundle), 1)
    assert found.static == pytest.approx(found.one_by_one)
    assert found.continuous == pytest.approx(found.one_by_one)
    made = estimate(bundle, gpu("a100"))
    assert 1e3 / found.one_by_one == pytest.approx(made.costs.image(alternating(bundle)))


def test_without_caching_the_steps_do_not_matter(bundle, shared_times):
    every = Schedule(np.ones((6, len(bundle.model.blocks)), np.bool_))
    found = throughput(shared_times, "p", every, 3)
    assert found.images_a_launch == 3
    prompts = 3 * shared_times.prompt_ms[1] - shared_times.prompt_ms[3]
    assert found.continuous_ms - found.static_ms == pytest.approx(prompts)
    assert found.one_by_one < found.continuous <= found.static


def test_a_continuous_batch_costs_what_ticks_of_random_steps_cost(bundle, shared_times):
    schedule = alternating(bundle)
    found = throughput(shared_times, "p", schedule, 3)
    runs = run_table(shared_times.loop, schedule)
    steps = np.stack(np.meshgrid(*[range(6)] * 3), -1).reshape(-1, 3)  # every tick there can be
    asking = runs[steps].sum(axis=1)  # [ticks, M]
    columns = np.arange(len(shared_times.loop))
    ticks = shared_times.launch_ms[asking, columns].sum(axis=1)
    assert found.continuous_ms == pytest.approx(6 * ticks.mean() + 3 * shared_times.prompt_ms[1])
    assert found.images_a_launch == pytest.approx(asking.sum() / (asking > 0).sum())


@settings(max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=4), st.integers(1, 9))
def test_probabilities_add_up_and_have_their_mean(share, requests):
    found = asking_probability(np.array(share), requests)
    np.testing.assert_allclose(found.sum(axis=0), 1, rtol=1e-12)
    np.testing.assert_allclose(np.arange(requests + 1) @ found, requests * np.array(share))


def test_the_command_prints_every_way(bundle, capsys):
    from blockcache.tools.bench import throughput as command

    command.main(str(bundle.folder), ["h100"], ["ddim:4"], [2])
    printed = capsys.readouterr().out
    assert "on h100" in printed
    assert re.search(r"\| ddim-4 \| 2 \| [\d.]+ \| [\d.]+ = 1\.\d\dx \|", printed)
