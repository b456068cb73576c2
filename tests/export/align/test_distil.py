"""Distillation: where it starts, what it leaves alone, that it learns."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from blockcache.export.align.distil import DistillationOptions, distil  # noqa: E402
from blockcache.export.measure.calibration import Calibration, calibration_noise  # noqa: E402
from blockcache.export.unet.cached_unet import CachedUNet, Denoiser  # noqa: E402
from blockcache.runtime import Alignment, ConfigError, Schedule  # noqa: E402
from blockcache.runtime.solver import SolverConfig, solver_tables  # noqa: E402

STEPS, SCALE = 3, 3.0
STILL = DistillationOptions(iterations=1, images_at_once=2, learning_rate=1e-12)
LEARNING = DistillationOptions(iterations=12, images_at_once=2, learning_rate=1e-3)


@pytest.fixture(scope="module")
def model(tiny_models):
    return tiny_models("one-level")


@pytest.fixture(scope="module")
def calibration(model, conditions_of):
    return Calibration(conditions_of(model, 2), conditions_of(model, 1, seed=5))


@pytest.fixture(scope="module")
def tables(model):
    return solver_tables(SolverConfig.from_diffusers(model.scheduler, solver="dpm", steps=STEPS))


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
def test_it_starts_at_the_table_that_it_is_given(model, tables, schedule, calibration, outputs):
    start, heard = random_start(model, schedule, outputs), []
    made = distil(
        model, tables, schedule, start, calibration, SCALE, STILL,
        progress=lambda done, total: heard.append((done, total)),
    )  # fmt: skip
    for ours, given in zip(made.tables, start.tables, strict=True):
        np.testing.assert_allclose(ours, given, rtol=0, atol=1e-6)
    assert heard == [(0, 1), (1, 1)]


@pytest.fixture(scope="module", params=[1, 2], ids=["scale-shift", "history"])
def learned(request, model, tables, schedule, calibration):
    """(The identity, what is learned from there, the weights before)."""
    weights = {name: value.clone() for name, value in model.unet.state_dict().items()}
    channels = tuple(block.channels for block in model.blocks)
    start = Alignment.identity(STEPS, channels, request.param)
    made = distil(model, tables, schedule, start, calibration, SCALE, LEARNING)
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
def losses(model, tables, schedule, calibration, alignment):
    """Per step, the student's relative error on the inputs of one uncached run."""
    noise = calibration_noise(model, [(0, 1), (1, 2)])
    made = []
    with CachedUNet(model, alignment.outputs) as cached:
        run = Denoiser(cached, tables, calibration.pick([0, 1], guided=True), SCALE)
        states = run.trajectory(noise)
        run.start(noise)
        for step in range(STEPS):
            rows = [table[step] for table in alignment.tables]
            output = run.output(states[step], step, schedule.recompute[step], rows)
            computed = [block.history for block in cached.blocks]
            target = run.output(states[step], step)
            for block, outputs in zip(cached.blocks, computed, strict=True):
                block.history = outputs
            made.append(float((output - target).square().mean() / target.square().mean()))
    return made


def test_the_loss_goes_down_on_other_noise(learned, model, tables, schedule, calibration):
    """About 5 % of it, measured; noise and prompts' order are drawn from fixed seeds."""
    start, made, _ = learned
    before = losses(model, tables, schedule, calibration, start)
    after = losses(model, tables, schedule, calibration, made)
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
