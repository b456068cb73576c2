"""Requests whose loop is the caller's: begin, predict, end."""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockcache.runtime import (
    Alignment,
    ConfigError,
    EmptyBackend,
    InputError,
    Schedule,
    Session,
)
from blockcache.runtime.engines import ort
from blockcache.runtime.solvers.solver import SolverConfig, solver_step_numpy, solver_tables

STEPS = 6
LATENTS = (1, 4, 16, 16)


@pytest.fixture(scope="module")
def bundle(compiled):
    return compiled("sd", outputs=2)[1]


@pytest.fixture(scope="module")
def session(bundle):
    """Six DPM-Solver++ steps with history; about half the blocks are reused."""
    found, rows = bundle.preset("dpm-20"), np.arange(STEPS)
    table = np.random.default_rng(3).random((STEPS, len(bundle.model.blocks))) < 0.5
    table[0] = True
    made = replace(
        found,
        name="made",
        solver={**found.solver, "steps": STEPS},
        schedule=Schedule(table),
        alignment=Alignment.identity(STEPS, bundle.model.block_channels, outputs=2),
        time_tables={name: values[rows] for name, values in found.time_tables.items()},
    )
    return Session(bundle, made, ort.OrtBackend(threads=1))


def prompts(count=1, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 7, 32)).astype(np.float32)


POSITIVE, NEGATIVE = prompts(1, 0), prompts(1, 99)
BOTH = np.concatenate([NEGATIVE, POSITIVE])


def draw(session, request, noise, first=0, scale=3.0, image=None):
    """The caller's own loop: guidance and solver in numpy."""
    tables = solver_tables(SolverConfig.from_json(session.preset.solver))
    signal, level = tables.noising[first]
    sample = (
        noise * np.float32(tables.initial_scale)
        if image is None
        else signal * image + level * noise
    )
    sample = sample.reshape(len(noise), -1).astype(np.float32)
    past, following = np.zeros((2, 2, *sample.shape), np.float32)
    scratch, rows = np.empty_like(sample), tables.rows_from(first)
    following[:] = sample * tables.input_scale[first]
    for step in range(first, session.steps):
        output = request.predict(step, following.reshape(-1, *noise.shape[1:]))
        flat = following.reshape(-1, sample.shape[1])
        now, earlier = output.reshape(flat.shape), past[step % 2]
        solver_step_numpy(
            rows[step], scale, sample, past[1 - step % 2], earlier, now, flat, scratch
        )
    return sample.reshape(noise.shape)


def relative(a, b):
    return float(np.abs(a - b).max() / np.abs(b).max())


# -- the same picture as denoise -------------------------------------------------------------------


def test_a_callers_loop_ends_where_denoise_ends(session):
    noise = session.noise([4])
    with session.begin(BOTH) as request:
        drawn = draw(session, request, noise)
    expected = session.denoise(noise, POSITIVE, NEGATIVE, guidance_scale=3.0)
    assert relative(drawn, expected.latents) < 1e-5
    assert np.array_equal(request.record.ran, expected.record.ran)
    assert not request.record.ran.all()


@given(first=st.integers(0, STEPS - 1))
def test_any_first_step_recomputes_everything(session, first):
    noise, image = session.noise([4]), session.noise([5])
    with session.begin(BOTH) as request:
        drawn = draw(session, request, noise, first, image=image)
    assert request.record.ran[first].all()
    expected = session.denoise(
        noise, POSITIVE, NEGATIVE, guidance_scale=3.0, image_latents=image, start_step=first
    )
    assert relative(drawn, expected.latents) < 1e-5


def test_nothing_of_the_request_before_is_reused(session):
    noise, other = session.noise([4]), session.noise([77])
    with session.begin(BOTH) as request:
        first = draw(session, request, noise)
    with session.begin(BOTH) as request:
        draw(session, request, other)
    with session.begin(BOTH) as request:
        assert np.array_equal(draw(session, request, noise), first)


# -- what the caller lays out ----------------------------------------------------------------------


def test_rows_are_independent_and_one_prompt_serves_all(session):
    samples = np.concatenate([session.noise([seed]) for seed in range(3)])
    with session.begin(POSITIVE, batch=3) as request:
        together = request.predict(0, samples)
    with session.begin(POSITIVE) as request:
        alone = request.predict(0, samples[1:2])
    assert together.shape == (3, *LATENTS[1:])
    assert relative(together[1:2], alone) < 1e-5


def test_other_sizes(session):
    with session.begin(POSITIVE, height=24, width=8) as request:
        assert request.predict(0, session.noise([0], 24, 8)).shape == (1, 4, 24, 8)


def test_sdxl_takes_its_conditions(compiled):
    opened = Session.open(compiled("sdxl")[1], preset="dpm-20")
    model = opened.bundle.model
    rows = {
        spec.name: np.ones(spec.shape(replace(model.sizes, batch=1)), np.float32)
        for spec in model.conditions
    }
    prompt = rows.pop("encoder_hidden_states")
    with opened.begin(prompt, conditions=rows) as request:
        assert np.isfinite(request.predict(0, opened.noise([0]))).all()
    with pytest.raises(InputError, match="text_embeds: this model needs it"):
        opened.begin(prompt)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tensors_of_torch(session, dtype):
    torch = pytest.importorskip("torch")
    sample = torch.from_numpy(session.noise([0])).to(getattr(torch, dtype))
    prompt = torch.from_numpy(POSITIVE).to(getattr(torch, dtype))
    with session.begin(prompt) as request:
        got = request.predict(0, sample)
    with session.begin(prompt.float().numpy()) as request:
        assert np.array_equal(request.predict(0, sample.float().numpy()), got)


# -- prompts ---------------------------------------------------------------------------------------


def test_an_unchanged_prompt_is_not_computed_again(session):
    sample = session.noise([0])
    with session.begin(POSITIVE) as request:
        first = request.predict(0, sample)
    with session.begin(POSITIVE.copy()) as request:
        assert request.record.prompt_ns == 0
        assert np.array_equal(request.predict(0, sample), first)
    with session.begin(NEGATIVE) as request:
        assert request.record.prompt_ns > 0
        assert not np.array_equal(request.predict(0, sample), first)


def test_a_caller_may_write_to_a_prompt_afterwards(session):
    prompt, sample = POSITIVE.copy(), session.noise([0])
    with session.begin(prompt) as request:
        first = request.predict(0, sample)
    prompt[:] = 0
    with session.begin(prompt) as request:
        assert request.record.prompt_ns > 0
    with session.begin(POSITIVE) as request:
        assert np.array_equal(request.predict(0, sample), first)


# -- order -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("second", "named"),
    [(4, "3, which follows step 2, got 4"), (2, "3.*, got 2"), (0, "3.*, got 0")],
)
def test_a_step_out_of_order_names_both(session, second, named):
    sample = session.noise([0])
    with session.begin(POSITIVE) as request:
        request.predict(2, sample)
        with pytest.raises(InputError, match=f"^step: expected {named}"):
            request.predict(second, sample)
        request.predict(3, sample)  # the request is as it was


def test_no_step_comes_after_the_last(session):
    with session.begin(POSITIVE) as request:
        request.predict(STEPS - 1, session.noise([0]))
        with pytest.raises(InputError, match=f"no more after step {STEPS - 1}, the last"):
            request.predict(STEPS - 1, session.noise([0]))


@pytest.mark.parametrize("step", [-1, STEPS, 1.0, True, "2", None])
def test_a_step_that_is_none_is_refused(session, step):
    with session.begin(POSITIVE) as request, pytest.raises(InputError, match=r"^step: "):
        request.predict(step, session.noise([0]))


@pytest.mark.parametrize(
    "sample",
    [
        np.zeros(LATENTS),
        np.zeros((2, *LATENTS[1:]), np.float32),
        np.zeros((1, 4, 16), np.float32),
        None,
        "x",
    ],
)
def test_a_sample_that_does_not_fit_is_refused(session, sample):
    with session.begin(POSITIVE) as request, pytest.raises(InputError, match=r"^sample: expected"):
        request.predict(0, sample)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch": 0}, "batch"),
        ({"batch": 2.0}, "batch"),
        ({"height": 15}, "height and width: expected a latent height and width divisible by 4"),
        ({"conditions": {"mask": POSITIVE}}, "mask: this model takes"),
        ({"prompt_embeds": POSITIVE.astype(np.float64)}, "encoder_hidden_states: expected"),
        ({"prompt_embeds": None}, "encoder_hidden_states: expected"),
        ({"prompt_embeds": POSITIVE * np.nan, "check_finite": True}, "encoder_hidden_states"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(session, changes, named):
    with pytest.raises(InputError, match=f"^{named}"):
        session.begin(**{"prompt_embeds": POSITIVE, **changes})
    session.begin(POSITIVE).end()


# -- one request at a time -------------------------------------------------------------------------


def test_while_a_request_is_open_the_session_takes_no_other(session):
    request = session.begin(POSITIVE)
    with pytest.raises(ConfigError, match="begin has opened is still open"):
        session.denoise(session.noise([0]), POSITIVE, guidance_scale=1)
    with pytest.raises(ConfigError, match="still open"):
        session.begin(POSITIVE)
    request.end()
    request.end()
    with pytest.raises(ConfigError, match="this one was ended"):
        request.predict(0, session.noise([0]))
    session.begin(POSITIVE).end()


def test_a_request_that_nobody_holds_is_over(session):
    request = session.begin(POSITIVE)
    del request
    gc.collect()
    session.begin(POSITIVE).end()


def test_a_request_of_a_closed_session_says_so(bundle):
    opened = Session.open(bundle, preset="dpm-20", backend="empty")
    request = opened.begin(POSITIVE)
    opened.close()
    with pytest.raises(ConfigError, match="this one is closed"):
        request.predict(0, opened.noise([0]))


# -- what callers ask of a session -----------------------------------------------------------------


def test_timesteps_and_levels_are_those_of_diffusers(session):
    diffusers = pytest.importorskip("diffusers")
    solver = session.preset.solver["noise"]
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule=solver["beta_schedule"],
        beta_start=solver["beta_start"],
        beta_end=solver["beta_end"],
    )
    scheduler.set_timesteps(STEPS)
    assert np.array_equal(session.timesteps, scheduler.timesteps.numpy())
    assert np.allclose(session.sigmas, scheduler.sigmas[:-1].numpy(), rtol=1e-5)
    session.timesteps[:] = 0  # a copy: nothing of the session
    assert session.timesteps[0] > 0


def test_the_config_is_that_of_diffusers(compiled):
    source, bundle = compiled("sd")
    config = Session.open(bundle, backend="empty").unet_config
    assert config["cross_attention_dim"] == source.unet.config.cross_attention_dim
    assert config["in_channels"] == 4
    assert not [name for name in config if name.startswith("_")]


def test_predict_costs_the_host_little(bundle):
    """At most 5 microseconds a segment, with engines that do nothing; others run beside it."""
    drop_in = pytest.importorskip("blockcache.tools.bench.drop_in")
    assert min(drop_in.predict_us(bundle, "dpm-20", rounds=9) for _ in range(3)) <= 5


def test_a_backend_that_lacks_a_member_is_refused(bundle):
    class Half:
        name = "half"
        device = EmptyBackend().device

    with pytest.raises(ConfigError, match=r"Half lacks \['loads_at_once', 'graphs',"):
        Session.open(bundle, backend=Half())
