"""The reference's states are values: a step changes none, and the same step gives the same."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from blockcache.export.measure.calibration import Calibration  # noqa: E402
from blockcache.export.measure.sampling import Sampling  # noqa: E402
from blockcache.runtime import Alignment, Schedule  # noqa: E402
from blockcache.runtime.solvers.diffusers_config import solver_from_diffusers  # noqa: E402
from blockcache.runtime.solvers.solver import solver_tables  # noqa: E402

STEPS = 4


@pytest.fixture(scope="module")
def sampling(tiny_models, conditions_of):
    model = tiny_models("one-level")
    calibration = Calibration(conditions_of(model, 2), conditions_of(model, 1, seed=5))
    solver = solver_from_diffusers(model.scheduler, solver="dpm", steps=STEPS)
    return Sampling(model, solver, calibration, 3.0)


@pytest.fixture
def begun(sampling):
    """(A denoiser of two images, their noise)."""
    with sampling.cached_unet(outputs=2) as cached:
        yield sampling.begin(cached, [(0, 0), (1, 1)])


def equal(state, other):
    ours, theirs = (
        [state.latents, *state.past, *(output for outputs in state.kept for output in outputs)]
        for state in (state, other)
    )
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_step_may_be_taken_again_and_in_any_order(begun, sampling):
    denoiser, noise = begun
    states = list(denoiser.trajectory(noise, sampling.uncached))
    none = np.zeros(len(sampling.model.blocks), np.bool_)
    reused = denoiser.step(states[1], 2, none)
    denoiser.step(denoiser.start(-noise), 0)  # another image, in between
    assert equal(denoiser.step(states[1], 2, none), reused)
    assert equal(denoiser.step(states[0], 1), states[1])
    assert all(ours is theirs for ours, theirs in zip(reused.kept, states[1].kept, strict=True))


def test_at_most_the_outputs_asked_for_are_kept_the_latest_first(begun, sampling):
    denoiser, noise = begun
    counts, last = [], None
    for state in denoiser.trajectory(noise, sampling.uncached):
        counts.append({len(outputs) for outputs in state.kept})
        if last is not None:
            assert all(a[1] is b[0] for a, b in zip(state.kept, last.kept, strict=True))
        last = state
    assert counts == [{1}, {2}, {2}, {2}]


def test_coefficients_may_be_fitted_where_a_block_is_reused(begun, sampling):
    """A fit that answers with a table's rows makes the run of that table."""
    denoiser, noise = begun
    recompute = np.random.default_rng(0).random((STEPS, len(sampling.model.blocks))) < 0.5
    recompute[0] = True
    channels = tuple(block.channels for block in sampling.model.blocks)
    alignment = Alignment.identity(STEPS, channels, 2)
    for k, table in enumerate(alignment.tables):
        table[~recompute[:, k], 0] = 0.9
    state, asked = denoiser.start(noise), np.zeros_like(recompute)
    for step in range(STEPS):

        def fit(k, computed, kept, step=step):
            assert computed.shape == kept[0].shape
            asked[step, k] = True
            return torch.from_numpy(alignment.tables[k][step])

        state = denoiser.step(state, step, recompute[step], fit)
    np.testing.assert_array_equal(asked, ~recompute)
    whole = denoiser.denoise(noise, Schedule(recompute), alignment)
    assert torch.equal(state.latents, whole)


def test_a_late_start_has_no_past(begun, sampling):
    """The first executed step recomputes all and takes the solver's row of a first step."""
    denoiser, noise = begun
    recompute = np.zeros((STEPS, len(sampling.model.blocks)), np.bool_)
    recompute[0] = True
    image = torch.full_like(noise, 0.5)
    late = list(denoiser.trajectory(noise, Schedule(recompute), image_latents=image, start_step=2))
    assert len(late) == STEPS - 2
    tables = solver_tables(sampling.solver)
    signal, spread = (float(value) for value in tables.noising[2])
    begin = dataclasses.replace(denoiser.start(noise), latents=signal * image + spread * noise)
    output, _ = denoiser.output(begin, 2)
    first = tables.first[2]
    expected = float(first[0]) * begin.latents + float(first[1]) * output
    assert torch.equal(late[0].latents, expected)
    assert equal(late[1], denoiser.step(late[0], 3, recompute[3]))
    assert first[1] != tables.coefficients[2][1], "a multistep row differs"


@pytest.mark.parametrize("scale", [0.0, 0.5, -2.0])
def test_a_guidance_scale_of_one_or_less_is_off_as_in_the_runtime(sampling, scale):
    """What a calibration draws is what a request of the same scale draws."""
    drawn = []
    for guidance_scale in (1.0, scale):
        plain = dataclasses.replace(sampling, guidance_scale=guidance_scale)
        with plain.cached_unet() as cached:
            denoiser, noise = plain.begin(cached, [(0, 0)])
            drawn.append(denoiser.denoise(noise, plain.uncached))
    assert torch.equal(*drawn)
