"""Distillation: where it starts, what it leaves alone, that it learns."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from blockcache.export.align.distil import DistillationOptions, distil  # noqa: E402
from blockcache.export.measure.calibration import Calibration  # noqa: E402
from blockcache.export.measure.sampling import Sampling  # noqa: E402
from blockcache.runtime import Alignment, ConfigError, Schedule  # noqa: E402
from blockcache.runtime.solvers.diffusers_config import solver_from_diffusers  # noqa: E402

STEPS, SCALE = 3, 3.0
STILL = DistillationOptions(iterations=1, images_at_once=2, learning_rate=1e-12)
LEARNING = DistillationOptions(iterations=12, images_at_once=2, learning_rate=1e-3)


@pytest.fixture(scope="module")
def model(tiny_models):
    return tiny_models("one-level")


@pytest.fixture(scope="module")
def sampling(model, conditions_of):
    calibration = Calibration(conditions_of(model, 2), conditions_of(model, 1, seed=5))
    solver = solver_from_diffusers(model.scheduler, solver="dpm", steps=STEPS)
    return Sampling(model, solver, calibration, SCALE)


@pytest.fixture(scope="module")
def schedule(model):
    """Everything at step 0, block 0 at step 1 too."""
    recompute = np.zeros((STEPS, len(model.blocks)), np.bool_)
    recompute[0], recompute[1, 0] = True, True
    return Schedule(recompute)


def random_start(model, schedule, outputs):
    """An alignment that changes every reused output."""
    random = np.random.default_rng(outputs)
    start = Alignment.identity(STEPS, tuple(block.channels for block in model.blocks), outputs)
    for k, table in enumerate(start.tables):
        noise = 0.1 * random.standard_normal(table.shape)
        table += np.where(schedule.recompute[:, k, None, None], 0.0, noise).astype(np.float32)
    return start


@pytest.mark.parametrize("outputs", [1, 2])
def test_it_starts_at_the_table_that_it_is_given(model, sampling, schedule, outputs):
    start, heard = random_start(model, schedule, outputs), []
    made = distil(
        sampling, schedule, start, STILL, observer=lambda *progress: heard.append(progress)
    )
    for ours, given in zip(made.tables, start.tables, strict=True):
        np.testing.assert_allclose(ours, given, rtol=0, atol=1e-6)
    assert heard == [("distil", 0, 1), ("distil", 1, 1)]


@pytest.fixture(scope="module", params=[1, 2], ids=["scale-shift", "history"])
def learned(request, model, sampling, schedule):
    """(The identity, what is learned from there, the weights before)."""
    weights = {name: value.clone() for name, value in model.unet.state_dict().items()}
    channels = tuple(block.channels for block in model.blocks)
    start = Alignment.identity(STEPS, channels, request.param)
    made = distil(sampling, schedule, start, LEARNING)
    return start, made, weights


def test_only_reused_entries_are_learned(learned, schedule):
    start, made, _ = learned
    made.check(schedule)
    for k, (ours, identity) in enumerate(zip(made.tables, start.tables, strict=True)):
        changed = (ours != identity).any(axis=(1, 2))
        np.testing.assert_array_equal(changed, ~schedule.recompute[:, k])


def test_all_else_is_frozen(learned, model):
    _, _, weights = learned
    after = model.unet.state_dict()
    assert after.keys() == weights.keys(), "the blocks are back in their places"
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    assert all(parameter.grad is None for parameter in model.unet.parameters())


@torch.no_grad()
def losses(sampling, schedule, alignment):
    """Per step, the student's relative error on the inputs of one uncached run."""
    made = []
    with sampling.cached_unet(alignment.outputs) as cached:
        denoiser, noise = sampling.begin(cached, [(0, 1), (1, 2)])
        begin = denoiser.start(noise)
        inputs = [begin, *denoiser.trajectory(noise, sampling.uncached)][:STEPS]
        kept = begin.kept
        for step, state in enumerate(inputs):
            rows = [table[step] for table in alignment.tables]
            seen = dataclasses.replace(state, kept=kept)
            output, kept = denoiser.output(seen, step, schedule.recompute[step], rows)
            target, _ = denoiser.output(state, step)
            made.append(float((output - target).square().mean() / target.square().mean()))
    return made


def test_the_loss_goes_down_on_other_noise(learned, sampling, schedule):
    """About 5 % of it, measured; noise and prompts' order are drawn from fixed seeds."""
    start, made, _ = learned
    before = losses(sampling, schedule, start)
    after = losses(sampling, schedule, made)
    assert before[0] == after[0] == 0
    assert before[1] > 0
    assert sum(after) < 0.98 * sum(before)


@pytest.mark.parametrize(
    "wrong", [{"iterations": 0}, {"images_at_once": 0}, {"learning_rate": 0.0},
              {"learning_rate": float("nan")}],
)  # fmt: skip
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match="Expected iterations, images and a rate above 0; got"):
        DistillationOptions(**wrong)
