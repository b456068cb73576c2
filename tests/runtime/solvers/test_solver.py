"""Solver tables against diffusers, against closed forms, and their error texts."""

import doctest
import importlib
import itertools
import json
import math
import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockcache.runtime.errors import ConfigError
from blockcache.runtime.solvers import solver as module
from blockcache.runtime.solvers.diffusers_config import solver_from_diffusers
from blockcache.runtime.solvers.noise import NoiseSchedule
from blockcache.runtime.solvers.philox import standard_normal
from blockcache.runtime.solvers.solver import (
    SOLVERS,
    SolverConfig,
    SolverTables,
    solver_step_numpy,
    solver_tables,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = (1, 2, 5, 14, 20)
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NOISE = {
    "linear": {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
    "scaled": SD,
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {
        "trained_betas": np.geomspace(2e-4, 0.03, 400).tolist(),
        "num_train_timesteps": 400,
    },
    "zero_snr": {**SD, "rescale_betas_zero_snr": True},
}
SPACINGS = (("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 1))
N, M = 2, 12
SEEDS = np.arange(N, dtype=np.uint64)

# Both sides round to float32: about four operations a step, each by 2^-24 = 6e-8 of its largest
# term, which guidance and the extrapolation make a few times the sample; diffusers also takes its
# DPM coefficients from float32 differences of logarithms, worth about 5e-7 of a step. Over 50
# steps these add up like a random walk to about 1e-6 (measured: 1.5e-6).
TOLERANCE = 1e-5
# Euler in diffusers computes x + (x - x0)/σ (σ' - σ) in float32. Where σ falls by a large factor
# the two terms cancel, and two roundings of the *earlier* sample stay in the later, small one. So
# Euler is held to TOLERANCE against the same formula in float64, and against diffusers to that
# plus these two roundings.
CANCELLATION = 2 * 2.0**-24


class LinearModel:
    """g = x W + b t: depends on the sample, so that an error of one step reaches the next."""

    def __init__(self, seed: int = 0):
        random = np.random.default_rng(seed)
        self.weight = (random.normal(size=(M, M)) / np.sqrt(2 * M)).astype(np.float32)
        self.bias = random.normal(size=M).astype(np.float32)

    def __call__(self, x, timestep):
        return x @ self.weight + self.bias * np.float32(0.3 + timestep / 2000)


def run(tables: SolverTables, x, model, *, start=0, scale=None):
    """Every sample from step ``start`` on; ``scale`` runs with guidance on doubled inputs."""
    sample, past, scratch = x.copy(), np.full((2, *x.shape), np.nan, np.float32), np.empty_like(x)
    rows, halves = tables.rows_from(start), 1 if scale is None else 2
    model_input = np.tile(tables.input_scale[start] * sample, (halves, 1))
    samples = []
    for step in range(start, len(tables.timesteps)):
        output = model(model_input, float(tables.timesteps[step]))
        noise = standard_normal(SEEDS, step, x.shape[1])
        previous, earlier = past[1 - step % 2], past[step % 2]
        solver_step_numpy(
            rows[step], scale, sample, previous, earlier, output, model_input, scratch, noise
        )
        samples.append(sample.copy())
    return samples


def reference(scheduler, x, model, *, start=0):
    """Every sample of the diffusers scheduler from step ``start`` on, with our noise handed in."""
    import torch

    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    sample, samples = torch.from_numpy(x.copy()), []
    module = importlib.import_module(type(scheduler).__module__)
    for step, timestep in enumerate(scheduler.timesteps[start:], start):
        noise = torch.from_numpy(standard_normal(SEEDS, step, M))
        scaled = scheduler.scale_model_input(sample, timestep)
        output = torch.from_numpy(model(scaled.numpy(), float(timestep)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "randn_tensor", lambda *_, z=noise, **__: z, raising=False)
            sample = scheduler.step(output, timestep, sample).prev_sample
        samples.append(sample.numpy())
    return samples


def diffusers_class(solver):
    diffusers = pytest.importorskip("diffusers")
    names = {
        **{"ddim": "DDIM", "dpm": "DPMSolverMultistep", "euler": "EulerDiscrete", "lcm": "LCM"},
        **{"unipc": "UniPCMultistep", "euler-a": "EulerAncestralDiscrete"},
        "dpm-sde": "DPMSolverMultistep",
    }
    return getattr(diffusers, names[solver] + "Scheduler")


def relative_error(ours, theirs):
    return max(
        float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in zip(ours, theirs, strict=True)
    )


def euler_in_float64(scheduler, x, model, *, start, ancestral):
    """Karras et al. 2022, alg. 1 on the sigmas of the diffusers scheduler; or with fresh noise."""
    sigmas, sample, samples = scheduler.sigmas.numpy().astype(np.float64), x.astype(np.float64), []
    for step in range(start, len(sigmas) - 1):
        sigma, unit = sigmas[step], np.sqrt(sigmas[step] ** 2 + 1)
        output = model(sample / unit, float(scheduler.timesteps[step]))
        x0 = {
            "epsilon": sample - sigma * output,
            "v_prediction": sample / unit**2 - output * sigma / unit,
            "sample": output,
        }[scheduler.config.prediction_type]
        down, up = sigmas[step + 1], 0.0
        if ancestral:
            up = down * np.sqrt(1 - down**2 / sigma**2)
            down = down**2 / sigma
        sample = sample + (sample - x0) / sigma * (down - sigma)
        sample = sample + up * standard_normal(SEEDS, step, M)
        samples.append(sample)
    return samples


def compare_from(scheduler, tables, solver, x, start):
    """Assert that every sample from step ``start`` on equals the scheduler's."""
    model = LinearModel()
    ours, theirs = (run(tables, x, model, start=start), reference(scheduler, x, model, start=start))
    if solver not in ("euler", "euler-a"):
        assert relative_error(ours, theirs) <= TOLERANCE
        return
    largest, ancestral = np.max(np.abs([x, *theirs])), solver == "euler-a"
    exact = euler_in_float64(scheduler, x, model, start=start, ancestral=ancestral)
    assert relative_error(ours, exact) <= TOLERANCE
    for a, b in zip(ours, theirs, strict=True):
        allowed = TOLERANCE * np.max(np.abs(b)) + CANCELLATION * largest
        assert np.max(np.abs(a - b)) <= allowed


def compare(solver, steps, options, starts=(0,)):
    """Assert equality with diffusers in everything; False if both refuse or fail."""
    scheduler = diffusers_class(solver)(**options)
    scheduler.set_timesteps(steps)
    random = np.random.default_rng(steps)
    x = random.normal(size=(N, M)).astype(np.float32)
    source = json.loads(scheduler.to_json_string())
    try:
        tables = solver_tables(solver_from_diffusers(source, steps=steps))
    except ConfigError:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert not np.isfinite(reference(scheduler, x, LinearModel())).all()
        return False
    # Karras timesteps are read off float32 logarithms, which processors round differently: by up
    # to 1e-4 of a training step, as seen, where the noise levels lie close together.
    np.testing.assert_allclose(tables.timesteps, scheduler.timesteps.numpy(), rtol=1e-6, atol=1e-3)
    assert tables.initial_scale == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-6)
    for start in starts:
        scheduler.set_timesteps(steps)
        if start:
            x, noise = random.normal(size=(2, N, M)).astype(np.float32)
            late = add_noise(scheduler, x, noise, start)
            mine = tables.noising[start, 0] * x + tables.noising[start, 1] * noise
            assert relative_error([mine], [late]) <= 1e-6
        else:
            late = x * np.float32(tables.initial_scale)
        compare_from(scheduler, tables, solver, late, start)
    return True


def add_noise(scheduler, x0, noise, start):
    import torch

    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    times = scheduler.timesteps[start : start + 1].repeat(N)
    return scheduler.add_noise(torch.from_numpy(x0), torch.from_numpy(noise), times).numpy()


def options_of(noise, prediction, spacing, extra):
    name, offset = spacing
    return {
        **NOISE[noise],
        **extra,
        "prediction_type": prediction,
        "timestep_spacing": name,
        "steps_offset": offset,
    }


SDE = {"algorithm_type": "sde-dpmsolver++"}
DDIM_LATENT = {"clip_sample": False}
KARRAS = {"use_karras_sigmas": True}


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("solver", "extra"),
    [("ddim", DDIM_LATENT), ("dpm", {}), ("dpm", KARRAS), ("euler", {}), ("euler", KARRAS)],
    ids=["ddim", "dpm", "dpm_karras", "euler", "euler_karras"],
)
def test_equals_diffusers_at_every_step(solver, extra, prediction, noise):
    equal = []
    for spacing, steps in itertools.product(SPACINGS, STEPS):
        if spacing[0] == "linspace" and extra == KARRAS and solver == "dpm":
            continue  # DPM's Karras sigmas span the training schedule, whatever the spacing
        equal.append(compare(solver, steps, options_of(noise, prediction, spacing, extra)))
    # Zero terminal SNR with epsilon fails in DDIM, unless the spacing leaves the last level out.
    expected_to_fail = (solver, prediction, noise) == ("ddim", "epsilon", "zero_snr")
    assert all(equal) != expected_to_fail


@pytest.mark.parametrize(
    ("solver", "extra"),
    [
        ("ddim", {**DDIM_LATENT, "set_alpha_to_one": False}),
        ("dpm", {"euler_at_final": True, "lower_order_final": False}),
        ("dpm", {"lower_order_final": False}),
        ("dpm", {"final_sigmas_type": "sigma_min"}),
        ("dpm", {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
        ("dpm", {"final_sigmas_type": "sigma_min", "lower_order_final": False, **KARRAS}),
        ("euler", {"final_sigmas_type": "sigma_min"}),
        ("euler", {"final_sigmas_type": "sigma_min", **KARRAS}),
        ("dpm-sde", {**SDE, "euler_at_final": True, "final_sigmas_type": "sigma_min"}),
        ("unipc", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
        ("unipc", {"final_sigmas_type": "sigma_min", **KARRAS}),
    ],
)
def test_final_step_options_equal_diffusers(solver, extra):
    for spacing, steps in itertools.product(SPACINGS, (1, 2, 14, 15)):
        assert compare(solver, steps, options_of("scaled", "v_prediction", spacing, extra))


@pytest.mark.parametrize(
    ("solver", "extra", "other"),
    [
        ("unipc", {}, KARRAS),
        ("dpm-sde", SDE, {**SDE, **KARRAS}),
        ("euler-a", {}, {}),
        ("lcm", {}, {}),
    ],
)
def test_more_terms_equal_diffusers_in_1_to_33_steps(solver, extra, other):
    """Two x0 and noise; noise schedules, predictions and spacings in turn, and late starts."""
    refused = []
    predictions = PREDICTIONS[:2] if solver == "euler-a" else PREDICTIONS  # diffusers has no more
    for steps, turn in itertools.product(range(1, 34), (0, 1)):
        noise = [*NOISE][(steps + 2 * turn) % 5]
        prediction = predictions[(steps // 2 + turn) % len(predictions)]
        spacing = SPACINGS[(steps // 3 + turn) % 4]
        options = {**(other if turn else extra)}
        if solver == "lcm":
            spacing = SPACINGS[0]
        options = options_of(noise, prediction, spacing, options)
        if not compare(solver, steps, options, starts=(0, steps // 3) if steps > 2 else (0,)):
            refused.append((noise, prediction))
    # Zero terminal SNR has no x0 in an epsilon of the first step.
    assert set(refused) <= {("zero_snr", "epsilon")}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("solver", "extra"), [("ddim", DDIM_LATENT), ("dpm", KARRAS), ("dpm", {}),
                                               ("euler", {})])  # fmt: skip
def test_late_start_equals_diffusers(solver, extra, prediction):
    for spacing, steps in itertools.product(SPACINGS, (14, 20)):
        options = options_of("scaled", prediction, spacing, extra)
        assert compare(solver, steps, options, starts=(1, steps // 3, steps - 1))


@pytest.mark.parametrize(
    ("solver", "steps", "spacing", "offset"),
    [("dpm", 100, "leading", 0), ("dpm", 99, "leading", 1)],
)
def test_repeated_noise_levels_are_refused_where_diffusers_fails(solver, steps, spacing, offset):
    options = {"timestep_spacing": spacing, "steps_offset": offset, "num_train_timesteps": 100}
    assert not compare(solver, steps, options)


def test_dpm_timesteps_may_repeat():
    options = {**SD, **KARRAS, "timestep_spacing": "linspace"}
    assert compare("dpm", 50, options)
    source = {"_class_name": "DPMSolverMultistepScheduler", **options}
    times = solver_tables(solver_from_diffusers(source, steps=50)).timesteps
    assert len(set(times.tolist())) < len(times)


@pytest.mark.parametrize("source", ["PNDM", "DDPM", "DDIM", "EulerDiscrete", "UniPCMultistep"])
@pytest.mark.parametrize("solver", ["ddim", "dpm", "euler", "unipc", "euler-a", "lcm"])
def test_reads_every_class_as_diffusers_does(source, solver):
    diffusers = pytest.importorskip("diffusers")
    own = getattr(diffusers, source + "Scheduler")
    options = {**SD, "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
    parameters = own.__init__.__wrapped__.__code__.co_varnames
    saved = own(**{key: value for key, value in options.items() if key in parameters})
    target = diffusers_class(solver).from_config(saved.config)
    target.set_timesteps(10)
    tables = solver_tables(solver_from_diffusers(saved.config, solver=solver, steps=10))
    np.testing.assert_allclose(tables.timesteps, target.timesteps.numpy(), rtol=1e-6)
    if not getattr(target.config, "clip_sample", False):
        x = np.random.default_rng(1).normal(size=(N, M)).astype(np.float32)
        compare_from(target, tables, solver, x * np.float32(tables.initial_scale), 0)


# ---- closed forms -------------------------------------------------------------------------------


def two_levels(**options):
    """α² = 0.64 and 0.36, so that α and σ are 0.8, 0.6 and 0.6, 0.8."""
    noise = NoiseSchedule(train_timesteps=2, trained_betas=(0.36, 0.4375))
    return SolverConfig(noise=noise, **options)


def test_ddim_by_hand():
    tables = solver_tables(two_levels(solver="ddim", steps=2))
    assert tables.timesteps.tolist() == [1.0, 0.0]
    # x0 = (x - 0.8 g) / 0.6, x' = 0.8 x0 + 0.6 g: from x = 1, g = 0.5 to x0 = 1, x' = 1.1.
    # x0 = (1.1 - 0.6 * 0.5) / 0.8 = 1 is the last sample.
    first, second = run(tables, np.ones((1, 1), np.float32), lambda x, t: np.float32(0.5) * x**0)
    assert first.item() == pytest.approx(1.1, rel=1e-6)
    assert second.item() == pytest.approx(1.0, rel=1e-6)
    np.testing.assert_allclose(tables.noising, [[0.6, 0.8], [0.8, 0.6]], rtol=1e-6)


def test_dpm_by_hand():
    config = two_levels(solver="dpm", steps=2, spacing="trailing", final_sigma="sigma_min",
                        lower_order_final=False, prediction="sample")  # fmt: skip
    tables = solver_tables(config)
    # Step 0: σ'/σ = 0.75 and 0.8 - 0.6 * 0.75 = 0.35 of x0. Step 1 stays at its level: x' = x.
    np.testing.assert_allclose(tables.coefficients[0, :6], [0.75, 0.35, 0, 0, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(tables.coefficients[1, :6], [1, 0, 0, 0, 0, 1], atol=1e-7)


def test_euler_and_ddim_are_one_solver_in_two_units():
    noise = NoiseSchedule(**SD)
    shared = {"steps": 20, "noise": noise, "prediction": "v_prediction"}
    ddim = solver_tables(SolverConfig(solver="ddim", **shared))
    euler = solver_tables(SolverConfig(solver="euler", **shared))
    x = np.random.default_rng(2).normal(size=(N, M)).astype(np.float32)
    model = LinearModel()
    scale = np.append(euler.input_scale[1:], 1)
    theirs = [s * unit for s, unit in zip(run(euler, x / euler.input_scale[0], model), scale)]  # noqa: B905
    assert relative_error(run(ddim, x, model), theirs) <= TOLERANCE


configs = st.builds(
    SolverConfig,
    solver=st.sampled_from([solver for solver in SOLVERS if solver != "lcm"]),
    steps=st.integers(1, 60),
    prediction=st.sampled_from(PREDICTIONS),
    spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    noise=st.builds(
        NoiseSchedule,
        train_timesteps=st.sampled_from([64, 300, 1000]),
        beta_schedule=st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
        beta_end=st.floats(0.002, 0.02),
        rescale_zero_snr=st.booleans(),
    ),
    steps_offset=st.integers(0, 1),
)


@settings(max_examples=60, deadline=None)
@given(configs, st.integers(0, 59))
def test_a_perfect_model_is_solved_exactly(config, start):
    """If the model knows x0, the last sample is x0 wherever the solver ends noise-free."""
    try:
        tables = solver_tables(config)
    except ConfigError:
        return
    start %= config.steps
    x0, noise = np.random.default_rng(3).normal(size=(2, N, M))
    sample = tables.noising[start, 0] * x0 + tables.noising[start, 1] * noise
    # In the rows' own arithmetic, but float64: x0 = (D - kept x) / weight cancels by σ/α.
    terms, past = 1.0, (np.zeros_like(sample),) * 2
    rows = tables.rows_from(start).astype(np.float64)
    for step, row in enumerate(rows[start:], start):
        alpha, sigma = tables.noising[step].astype(np.float64)
        unit = np.hypot(alpha, sigma)
        noise_now = (sample - alpha * x0) / sigma
        outputs = {
            "epsilon": noise_now,
            "v_prediction": (alpha * noise_now - sigma * x0) / unit,
            "sample": x0,
        }
        output = outputs[config.prediction]
        terms = max(
            terms, *(float(np.max(np.abs(row[i] * v))) for i, v in ((0, sample), (1, output)))
        )
        noise = row[7] * standard_normal(SEEDS, step, M)
        sample, past = (
            row[0] * sample + row[1] * output + row[2] * past[0] + row[3] * past[1] + noise,
            (row[4] * sample + row[5] * output, past[0]),
        )
    below = int(tables.timesteps[-1]) - config.noise.train_timesteps // config.steps
    if config.solver == "ddim" and below >= 0:
        return  # diffusers' DDIM ends at a training level here, not at zero noise
    assert np.max(np.abs(sample - x0)) <= 8 * 2.0**-24 * terms


@settings(max_examples=100, deadline=None)
@given(configs)
def test_json_round_trip(config):
    assert SolverConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@settings(max_examples=60, deadline=None)
@given(configs)
def test_tables_are_finite_and_first_rows_read_no_x0(config):
    try:
        tables = solver_tables(config)
    except ConfigError:
        return
    for table in (tables.coefficients, tables.first, tables.second):
        assert table.dtype == np.float32
        assert table.shape == (config.steps, 8)
        assert np.isfinite(table).all()
    assert not tables.first[:, 2:4].any()
    assert not tables.second[:, 3].any()
    np.testing.assert_array_equal(tables.first[0], tables.coefficients[0])
    np.testing.assert_array_equal(tables.coefficients[:-1, 6], tables.input_scale[1:])


def test_json_keeps_trained_betas():
    config = two_levels(solver="dpm", steps=1, karras=True)
    assert SolverConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


# ---- the numpy step -----------------------------------------------------------------------------


def step_arrays(rows):
    random = np.random.default_rng(4)
    shapes = {"sample": N, "previous_x0": N, "earlier_x0": N, "model_output": rows}
    shapes |= {"next_input": rows, "scratch": N, "noise": N}
    return {k: random.normal(size=(n, M)).astype(np.float32) for k, n in shapes.items()}


@pytest.mark.parametrize("rows", [N, 2 * N])
def test_step_is_the_documented_formula(rows):
    row = np.array([0.9, -0.3, 0.2, -0.6, 1.1, -0.7, 0.5, 0.4], dtype=np.float32)
    now = step_arrays(rows)
    names = ("sample", "previous_x0", "earlier_x0", "model_output", "noise")
    x, h, e, out, z = (now[name].astype(np.float64) for name in names)
    g = out if rows == N else out[:N] + 7.5 * (out[N:] - out[:N])
    solver_step_numpy(row, 7.5, **now)
    wanted = row[0] * x + row[1] * g + row[2] * h + row[3] * e + row[7] * z
    np.testing.assert_allclose(now["sample"], wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(now["previous_x0"], h)
    np.testing.assert_allclose(now["earlier_x0"], row[4] * x + row[5] * g, rtol=1e-5, atol=1e-5)
    repeated = np.tile(row[6] * now["sample"], (rows // N, 1))
    np.testing.assert_array_equal(now["next_input"], repeated)


def test_step_without_x0_or_next_input():
    row = np.array([0.9, -0.3, 0, 0, 0, 0, 1, 0], dtype=np.float32)
    now = step_arrays(N)
    wanted = row[0] * now["sample"] + row[1] * now["model_output"]
    solver_step_numpy(
        row, None, **{**now, "previous_x0": None, "earlier_x0": None, "next_input": None}
    )
    np.testing.assert_allclose(now["sample"], wanted, rtol=1e-6)


def test_step_allocates_nothing():
    row = solver_tables(SolverConfig(solver="dpm", steps=20)).coefficients[7]
    big = {k: np.tile(v, (1, 20_000)) for k, v in step_arrays(2 * N).items()}
    solver_step_numpy(row, 7.5, **big)
    tracemalloc.start()
    solver_step_numpy(row, 7.5, **big)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < big["sample"].nbytes / 100


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "heun"}, r"solver: expected one of \('dpm', 'unipc', .*\), got 'heun'"),
        ({"steps": 0}, "steps: expected a whole number >= 1, got 0"),
        ({"steps": True}, "steps: expected a whole number"),
        ({"steps": 1001}, "steps: expected at most 1000, got 1001"),
        ({"prediction": "flow"}, "prediction: expected one of .*, got 'flow'"),
        ({"spacing": "even"}, "spacing: expected one of"),
        ({"steps_offset": -1}, "steps_offset: expected a whole number >= 0, got -1"),
        ({"karras": 1}, "karras: expected true or false, got 1"),
        (
            {"karras": True},
            "karras: expected False with solver 'ddim', got True. Only dpm and euler and unipc and",
        ),
        (
            {"solver": "dpm", "set_alpha_to_one": False},
            "set_alpha_to_one: expected True with solver",
        ),
        ({"solver": "lcm", "fitted": ()}, "fitted: expected none with a solver that adds noise"),
        ({"fitted": ((0, 0, 0, 0),)}, "fitted: expected 10 x 4 finite numbers"),
        ({"fitted": "abc"}, "fitted: expected 10 x 4 finite numbers"),
        ({"steps": 1, "fitted": ((0, math.nan, 0, 0),)}, "fitted: expected 1 x 4 finite numbers"),
        ({"steps": 1, "fitted": ((0, 0, 1, 0),)}, "fitted: expected 0 for what no step has left"),
        ({"steps": 2, "fitted": ((0,) * 4, (0, 0, 0, 1))}, "fitted: expected 0 for what no step"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        SolverConfig(**{"solver": "ddim", "steps": 10, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule: expected one of .*, got 'sigmoid'"),
        ({"beta_start": 0}, "beta_start: expected a number between 0 and 1, got 0"),
        ({"beta_end": float("nan")}, "beta_end: expected a number between 0 and 1, got nan"),
        ({"trained_betas": (0.1,)}, r"trained_betas: expected 1000 \(train_timesteps\), got 1"),
        ({"train_timesteps": 1, "trained_betas": (1e-9,)}, r"noise: expected .* got \[1.0, 1.0\]"),
        ({"beta_end": 0.9}, "noise: expected 1 - beta whose products fall"),
    ],
)
def test_noise_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        NoiseSchedule(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"noise": NoiseSchedule(rescale_zero_snr=True), "spacing": "trailing"},
            r"prediction: expected v_prediction or sample, as the first step is pure .*'epsilon'",
        ),
        (
            {"steps": 61, "spacing": "trailing"},
            "steps: expected a number that 'trailing' can do, got 61",
        ),
        (
            {"steps": 1000, "steps_offset": 1},
            "steps_offset: expected timesteps below 1000, got 1000",
        ),
        ({"solver": "dpm", "steps": 1000}, "steps: expected noise to fall at each, got 1000"),
        ({"solver": "lcm", "steps": 51}, "steps: expected at most 50, on which it was distilled"),
        (
            {"solver": "unipc", "lower_order_final": False},
            "lower_order_final: expected true where the last step ends at zero noise, got False",
        ),
    ],
)
def test_table_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        solver_tables(SolverConfig(**{"solver": "ddim", "steps": 10, **options}))


@pytest.mark.parametrize(
    ("solver", "options", "name"),
    [
        ("ddim", {"clip_sample": True}, "clip_sample"),
        ("ddim", {"_class_name": "DDIMScheduler"}, "clip_sample"),
        ("ddim", {"thresholding": True}, "thresholding"),
        ("ddim", {"variance_type": "learned_range"}, "variance_type"),
        ("ddim", {"prediction_type": "flow_prediction"}, "prediction"),
        ("dpm", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type"),
        ("dpm", {"solver_order": 3}, "solver_order"),
        ("dpm", {"solver_type": "heun"}, "solver_type"),
        ("dpm", {"lambda_min_clipped": -5.1}, "lambda_min_clipped"),
        ("dpm", {"use_lu_lambdas": True}, "use_lu_lambdas"),
        ("dpm", {"use_flow_sigmas": True}, "use_flow_sigmas"),
        ("euler", {"use_exponential_sigmas": True}, "use_exponential_sigmas"),
        ("euler", {"use_beta_sigmas": True}, "use_beta_sigmas"),
        ("euler", {"timestep_type": "continuous"}, "timestep_type"),
        ("euler", {"interpolation_type": "log_linear"}, "interpolation_type"),
        ("euler", {"sigma_max": 80.0}, "sigma_max"),
        (None, {"_class_name": "HeunDiscreteScheduler"}, "solver"),
        ("unipc", {"solver_type": "bh1"}, "solver_type"),
        ("unipc", {"solver_order": 3}, "solver_order"),
        ("unipc", {"predict_x0": False}, "predict_x0"),
        ("unipc", {"disable_corrector": [0]}, "disable_corrector"),
        ("dpm-sde", {"algorithm_type": "sde-dpmsolver"}, "algorithm_type"),
        ("lcm", {"original_inference_steps": 100}, "original_inference_steps"),
        ("lcm", {"timestep_scaling": 1.0}, "timestep_scaling"),
        ("euler", {"beta_schedule": "exp"}, "beta_schedule"),
    ],
)
def test_diffusers_options_refused_by_name(solver, options, name):
    with pytest.raises(ConfigError, match=f"^{name}: expected .*, got .*"):
        solver_from_diffusers({**SD, **options}, solver=solver, steps=10)


def test_a_config_without_betas_is_refused():
    source = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
    with pytest.raises(ConfigError, match=r"beta_schedule: expected .*, got 'FlowMatchEuler"):
        solver_from_diffusers(source, solver="euler", steps=10)


def test_options_of_other_solvers_are_not_read():
    source = {**SD, "clip_sample": True, "solver_order": 3, "use_karras_sigmas": True}
    assert solver_from_diffusers(source, solver="euler", steps=5).karras
    source["clip_sample"] = False
    assert not solver_from_diffusers(source, solver="ddim", steps=5).karras


@pytest.mark.parametrize(
    "mapping",
    [{"solver": "ddim", "steps": 5, "eta": 1}, {"solver": "ddim"}, {}, None, [],
     {"solver": "ddim", "steps": 5, "noise": {"sigma": 1}},
     {"solver": "ddim", "steps": 5, "noise": None}],
)  # fmt: skip
def test_json_with_wrong_keys_is_refused(mapping):
    with pytest.raises(ConfigError, match=r"Expected \[.*got .*Correct it"):
        SolverConfig.from_json(mapping)


def test_docstring_examples_run():
    assert doctest.testmod(module).failed == 0
