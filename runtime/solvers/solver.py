"""Diffusion solvers as tables of coefficients.

A step is linear in the sample x, the guided model output g, the data predictions h and e of the two
steps before, and fresh noise z. It goes from a noise level (α, σ) to the next (α', σ') by

    x' = K x + W ((1 + k) x0 - k h) + R z,      x0 linear in x and g.

- DDIM (Song et al. 2021, eq. 12, σ_t = 0), Euler (Karras et al. 2022, alg. 1, on x/α): K = σ'/σ,
  W = α' - α K, R = 0, k = 0.
- DPM-Solver++ 2M (Lu et al. 2022, alg. 2): the same K and W; k is half the ratio of this step to
  the last in λ = log(α/σ).
- Its SDE form: K = q σ'/σ, W = α' (1 - q²), R = σ' sqrt(1 - q²) with q = exp(λ - λ').
  Euler ancestral is its first order (k = 0), on x/α.
- LCM (Luo et al. 2023): K = α' c_skip, W = α' c_out, R = σ', k = 0.
- UniPC (Zhao et al. 2023, order 2, B2) steps as DPM-Solver++ 2M does, from a corrected sample
  x + u x0 + v h + w e: where the step before would have gone, had it known x0. That sample is never
  computed: the correction goes into the coefficients of x0, h and e.
- A *fitted* solver knows its model and its grid: to the step of first order it adds
  c0 x + c1 x0 + c2 (x0 - h) + c3 (h - e), with coefficients from least squares
  (export/align/solver_fit.py). Every solver without noise can be fitted.

Noise levels are those of diffusers to the last bit (float32); all else is float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from blockcache.runtime.solvers.grid import Grid
from blockcache.runtime.solvers.noise import Float32, Float64, NoiseSchedule
from blockcache.runtime.solvers.options import check_types, from_mapping, require

STOCHASTIC = ("euler-a", "dpm-sde", "lcm")
"""Solvers that add fresh noise at every step, so that each image needs a seed."""

SOLVERS = ("dpm", "unipc", "ddim", "euler", *STOCHASTIC)

MULTISTEP = ("dpm", "dpm-sde", "unipc")
"""Solvers that remember data predictions."""

SCALED = ("euler", "euler-a")
"""Solvers whose sample is x/α."""

READ_BY: dict[str, tuple[str, ...]] = {
    "set_alpha_to_one": ("ddim",),
    **dict.fromkeys(("spacing", "steps_offset"), tuple(name for name in SOLVERS if name != "lcm")),
    **dict.fromkeys(("karras", "final_sigma"), ("dpm", "euler", "unipc", "dpm-sde")),
    "lower_order_final": MULTISTEP,
    "euler_at_final": ("dpm", "dpm-sde"),
}
"""Options that only some solvers read; with the others they keep their default."""

LCM_STEPS = 50
"""Steps that an LCM was distilled on (diffusers' original_inference_steps)."""

FITTED = ("x", "x0", "x0 - h", "h - e")
"""What the coefficients of a fitted step belong to."""

DERIVES_LEVELS = ("spacing", "steps_offset", "set_alpha_to_one", "karras", "final_sigma")
"""What decides where the levels lie, unless a grid says it."""

_CHOICES = {
    "solver": SOLVERS,
    "prediction": ("epsilon", "v_prediction", "sample"),
    "spacing": ("leading", "trailing", "linspace"),
    "final_sigma": ("zero", "sigma_min"),
}


@dataclass(frozen=True, kw_only=True)
class SolverConfig:
    """Which solver runs, in how many steps, over which noise levels.

    ``dpm`` is DPM-Solver++ 2M, midpoint; ``dpm-sde`` its SDE form; ``euler-a`` Euler ancestral;
    ``unipc`` UniPC of order 2 with B2; ``lcm`` takes its steps from the 50 it was distilled on.
    ``spacing``: Lin et al. 2024, table 2; ``steps_offset`` shifts ``leading``.
    ``set_alpha_to_one``: DDIM ends noise-free, not at the first training level. ``karras``: sigmas
    of Karras et al. 2022, eq. 5. ``lower_order_final``: a first-order last step below 15 steps
    (``unipc``: always); ``euler_at_final``: always. ``final_sigma``: where those that read it end.
    ``grid``: the noise levels themselves, in place of all that would derive them; every solver then
    ends noise-free. ``fitted``: c0 to c3 of every step, in place of what the solver itself would
    add to its first order.

    Examples:
        >>> config = SolverConfig(solver="ddim", steps=20)
        >>> SolverConfig.from_json(config.to_json()) == config
        True
    """

    solver: str
    steps: int
    prediction: str = "epsilon"
    spacing: str = "leading"
    noise: NoiseSchedule = field(default_factory=NoiseSchedule)
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    karras: bool = False
    lower_order_final: bool = True
    euler_at_final: bool = False
    final_sigma: str = "zero"
    grid: Grid | None = None
    fitted: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        check_types(self, _CHOICES)
        T = self.noise.train_timesteps
        if self.grid is not None:
            self._check_grid(self.grid)
        if self.fitted is not None:
            self._check_fitted(self.fitted)
        require(self.steps <= T, "steps", f"at most {T}", self.steps, "Training had no more.")
        for item in fields(self):
            value, readers = getattr(self, item.name), READ_BY.get(item.name, SOLVERS)
            read, wanted = self.solver in readers, f"{item.default!r} with solver {self.solver!r}"
            advice = f"Only {' and '.join(readers)} read it: leave it out."
            require(read or value == item.default, item.name, wanted, value, advice)

    def _check_grid(self, grid: Grid) -> None:
        """A grid fits the steps, and nothing else says where they lie."""
        S, T = self.steps, self.noise.train_timesteps
        require(grid.steps == S, "grid", f"{S} levels, one a step", grid.steps, "Correct it.")
        wanted = f"timesteps below {T} (train_timesteps)"
        require(max(grid.timesteps) < T, "grid", wanted, max(grid.timesteps), "Correct it.")
        for name in DERIVES_LEVELS:
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            require(value == default, name, f"{default!r} beside a grid", value, "Leave it out.")

    def _check_fitted(self, fitted: Any) -> None:
        """Four finite numbers a step, none of them for an x0 that no step has left yet."""
        without_noise = self.solver not in STOCHASTIC
        wanted = "none with a solver that adds noise"
        require(without_noise, "fitted", wanted, self.solver, "Leave it out.")
        try:
            table = np.asarray(fitted, np.float64)
        except (TypeError, ValueError):
            table = np.zeros(0)
        right = table.shape == (self.steps, len(FITTED)) and bool(np.isfinite(table).all())
        wanted = f"{self.steps} x {len(FITTED)} finite numbers"
        require(right, "fitted", wanted, fitted, "Correct it.")
        early = table[0, 2:].any() or table[1:2, 3:].any()
        wanted = "0 for what no step has left yet (x0 - h at step 0, h - e at steps 0 and 1)"
        require(not early, "fitted", wanted, fitted, "Correct it.")
        object.__setattr__(self, "fitted", tuple(map(tuple, table.tolist())))

    def to_json(self) -> dict[str, Any]:
        """Every option, as values that JSON has."""
        grid = None if self.grid is None else self.grid.to_json()
        fitted = None if self.fitted is None else [list(row) for row in self.fitted]
        return {**asdict(self), "grid": grid, "fitted": fitted}

    @classmethod
    def from_json(cls, mapping: Mapping[str, Any]) -> SolverConfig:
        """The inverse of ``to_json``; unknown and missing keys are a ConfigError."""
        if isinstance(mapping, Mapping) and "noise" in mapping:
            mapping = {**mapping, "noise": from_mapping(NoiseSchedule, mapping["noise"])}
        if isinstance(mapping, Mapping) and mapping.get("grid") is not None:
            mapping = {**mapping, "grid": Grid.from_json(mapping["grid"])}
        return from_mapping(cls, mapping)


@dataclass(frozen=True, eq=False)
class SolverTables:
    """A solver bound to its steps: tables indexed by step 0 ... S-1.

    A row is c_sample, c_model, c_previous, c_earlier, d_sample, d_model, next_input_scale, c_noise.
    With h and e the x0 of the step before and of the one before that, and z fresh noise, the step
    makes x' = c_sample x + c_model g + c_previous h + c_earlier e + c_noise z, keeps
    d_sample x + d_model g as its x0, and the model sees next_input_scale x'. What has the
    coefficient 0 is never read.
    """

    timesteps: Float32  # [S], what the model is conditioned on; fractional for some Euler steps
    coefficients: Float32  # [S, 8]
    first: Float32  # [S, 8], the row of a step that is the first one executed: no h yet
    second: Float32  # [S, 8], the row of a step that is the second one executed: no e yet
    input_scale: Float32  # [S], model input = input_scale * sample
    noising: Float32  # [S, 2], sample of the step = noising[:, 0] * x0 + noising[:, 1] * noise
    initial_scale: float  # sample at step 0 = initial_scale * standard normal noise
    final_sigma: float  # noise over signal that the last step ends at; mostly 0

    def rows_from(self, first: int) -> Float32:
        """The rows of a run whose first executed step is ``first``: float32 [S, 8]."""
        rows = np.array(self.coefficients)
        rows[first] = self.first[first]
        rows[first + 1 : first + 2] = self.second[first + 1 : first + 2]
        return rows


def solver_tables(config: SolverConfig) -> SolverTables:
    """The tables of ``config``; ConfigError where a step of it would not be finite.

    Examples:
        >>> solver_tables(SolverConfig(solver="ddim", steps=2)).timesteps.tolist()
        [500.0, 0.0]
    """
    timesteps, alpha, sigma, alpha_to, sigma_to = _visited_levels(config)
    levels = (alpha, sigma, alpha_to, sigma_to)
    kept, weight, spread = _step(config.solver, timesteps, *levels)
    p_sample, p_model = _data_prediction(config.prediction, alpha, sigma)
    one = np.ones_like(alpha)
    multistep = float(config.solver in MULTISTEP or config.fitted is not None)
    # Euler's sample is x/α: c_sample and c_model change unit, from this level's to the next one's.
    scale, scale_to = (alpha, alpha_to) if config.solver in SCALED else (one, one)

    def rows(k: Float64, correction: Float64) -> Float64:
        of_x0, of_previous, of_earlier = kept * correction
        of_x0 = of_x0 + weight * (1 + k)
        c_sample, c_model = (kept + of_x0 * p_sample) * scale, of_x0 * p_model
        past = (of_previous - weight * k, of_earlier)
        prediction = multistep * p_sample, multistep * p_model
        moved = [column / scale_to for column in (c_sample, c_model, *past)]
        columns = (*moved, *prediction, np.append(scale[1:], 1.0), spread / scale_to)
        return np.stack(columns, axis=1)

    none, of_first_order, of_second_order = _corrections(config.solver, weight, *levels)
    first = rows(0 * one, none)
    if config.fitted is not None:
        fitted = np.array(config.fitted)
        coefficients = _with_fitted(first, fitted)
        first[0] = coefficients[0]  # what the others add was fitted with an h
        second = _with_fitted(first, fitted * [1, 1, 1, 0])
    else:
        k = _extrapolation(config, *levels)
        coefficients, second = rows(k, of_second_order), rows(k, of_first_order)
    initial = 1 / scale[0] if config.spacing == "leading" else np.max(sigma / scale)
    return SolverTables(
        timesteps=timesteps.astype(np.float32),
        coefficients=coefficients.astype(np.float32),
        first=first.astype(np.float32),
        second=second.astype(np.float32),
        input_scale=scale.astype(np.float32),
        noising=np.stack([alpha / scale, sigma / scale], axis=1).astype(np.float32),
        initial_scale=float(initial) if config.solver in SCALED else 1.0,
        final_sigma=float(sigma_to[-1] / alpha_to[-1]),
    )


def _with_fitted(rows: Float64, fitted: Float64) -> Float64:
    """Rows of first order [S, 8] and what is fitted to them, c0 to c3 [S, 4]."""
    made = np.array(rows)
    x, x0, change, earlier = fitted.T
    made[:, 0] += x
    made[:, :2] += (x0 + change)[:, None] * rows[:, 4:6]
    made[:, 2] += earlier - change
    made[:, 3] -= earlier
    return made


def _step(
    solver: str, timesteps: Float64, alpha: Float64, sigma: Float64, alpha_to: Float64,
    sigma_to: Float64,
) -> tuple[Float64, Float64, Float64]:  # fmt: skip
    """K, W, R of x' = K x + W x0 + R z, float64 [S] each."""
    if solver == "lcm":  # the boundary conditions of diffusers: sigma_data 0.5, timestep_scaling 10
        scaled = 10 * timesteps
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / np.sqrt(scaled**2 + 0.25)
        return alpha_to * c_skip, alpha_to * c_out, sigma_to
    if solver in STOCHASTIC:
        q = alpha * sigma_to / (alpha_to * sigma)
        return q * sigma_to / sigma, alpha_to * (1 - q**2), sigma_to * np.sqrt(1 - q**2)
    kept = sigma_to / sigma
    return kept, alpha_to - alpha * kept, np.zeros_like(alpha)


def _corrections(solver: str, weight: Float64, *levels: Float64) -> Float64:
    """u, v, w of UniPC's corrector: none, after a step of order 1 and of 2; float64 [3, 3, S].

    The step that came here has the length l in λ, the one before it l'. It is corrected by
    W (ρ' d' + ρ d), where d = x0 - h and d' = (h - e) l / l' are the differences along it. The
    predictor had 1/2 for ρ' (order 2) and 0 for ρ.
    """
    corrections = np.zeros((3, 3, len(weight)))
    if solver != "unipc":
        return corrections
    alpha, sigma = levels[:2]
    W = weight[:-1]  # of the step that came here
    corrections[1, :2, 1:] = W / 2, -W / 2
    corrections[2, :, 1:2] = corrections[1, :, 1:2]
    lengths = np.diff(np.log(alpha / sigma))
    ratio, hh = lengths[1:] / lengths[:-1], -lengths[1:]  # hh: the paper's -h
    b1 = (np.expm1(hh) / hh - 1) / np.expm1(hh)
    b2 = 2 * ((np.expm1(hh) / hh - 1) / hh - 0.5) / np.expm1(hh)
    rho_past = (b1 - b2) / (1 + 1 / ratio)
    rho, earlier = b1 - rho_past, (0.5 - rho_past) * ratio
    corrections[2, :, 2:] = W[1:] * np.stack([rho, -rho - earlier, earlier])
    return corrections


def _data_prediction(prediction: str, alpha: Float64, sigma: Float64) -> tuple[Float64, Float64]:
    """p, q of x0 = p x + q g, from x = α x0 + σ ε and v = α ε - σ x0; all [S]."""
    if prediction == "sample":
        return np.zeros_like(alpha), np.ones_like(alpha)
    if prediction == "v_prediction":
        return alpha, -sigma
    wanted = "v_prediction or sample, as the first step is pure noise (rescale_zero_snr)"
    advice = "Use spacing 'leading' if the model does predict epsilon."
    require(np.all(alpha > 0), "prediction", wanted, prediction, advice)
    return 1 / alpha, -sigma / alpha


def _extrapolation(config: SolverConfig, *levels: Float64) -> Float64:
    """The k of each step, float64 [S], from its α, σ, α', σ': 0 where it is of first order."""
    k, ends_at_zero = np.zeros_like(levels[0]), bool(levels[3][-1] == 0)
    if config.solver not in ("dpm", "dpm-sde", "unipc"):
        return k
    low_end = config.lower_order_final
    if config.solver == "unipc":
        wanted, advice = "true where the last step ends at zero noise", "Leave it out."
        require(low_end or not ends_at_zero, "lower_order_final", wanted, low_end, advice)
    else:
        low_end = (low_end and config.steps < 15) or config.euler_at_final or ends_at_zero
    end = config.steps - low_end
    alpha, sigma, alpha_to, sigma_to = (level[:end] for level in levels)
    h = np.log(alpha_to * sigma / (alpha * sigma_to))
    read = h[: config.steps - 1] if config.solver == "unipc" else h[:-1]
    require(np.all(read > 0), "steps", "noise to fall at each", config.steps, "Use fewer.")
    k[1:end] = h[1:] / h[:-1] / 2
    return k


def _timesteps(config: SolverConfig) -> Float64:
    """The spaced timesteps, falling, float64 [S]; multistep solvers leave out the last of S + 1."""
    T, S = config.noise.train_timesteps, config.steps
    points = S + 1 if config.solver in MULTISTEP else S
    if config.solver == "lcm":
        wanted, advice = f"at most {LCM_STEPS}, on which it was distilled", "Use fewer."
        require(S <= LCM_STEPS, "steps", wanted, S, advice)
        distilled = np.arange(LCM_STEPS, 0, -1) * (T // LCM_STEPS) - 1.0
        chosen = distilled[np.linspace(0, LCM_STEPS, S, endpoint=False).astype(np.int64)]
        return np.asarray(chosen, np.float64)
    if config.spacing == "leading":
        spaced = np.arange(points)[::-1][:S] * float(T // points) + config.steps_offset
    elif config.spacing == "linspace":
        spaced = np.linspace(0, T - 1, points)[::-1][:S]
        spaced = spaced.astype(np.float32) if config.solver in SCALED else np.round(spaced)
    else:
        spaced = np.round(np.arange(T, 0, -T / S)) - 1
    require(len(spaced) == S, "steps", "a number that 'trailing' can do", S, "Take one less.")
    return spaced.astype(np.float64)


def _visited_levels(config: SolverConfig) -> tuple[Float64, ...]:
    """Timesteps, then α, σ of each step and α', σ' that it goes to; all [S]."""
    if config.grid is not None:
        sigmas = np.append(np.asarray(config.grid.sigmas, np.float64), 0.0)
        return np.asarray(config.grid.timesteps, np.float64), *_from_ratios(sigmas)
    return _ddim_levels(config) if config.solver in ("ddim", "lcm") else _sigma_levels(config)


def _from_ratios(ratio: Float64) -> tuple[Float64, Float64, Float64, Float64]:
    """α, σ and α', σ' of steps between neighbours of σ/α, float64 [S + 1]."""
    ratio = ratio.astype(np.float32).astype(np.float64)
    alpha = 1 / np.sqrt(1 + ratio**2)
    sigma = ratio * alpha
    return alpha[:-1], sigma[:-1], alpha[1:], sigma[1:]


def _ddim_levels(config: SolverConfig) -> tuple[Float64, ...]:
    """Timesteps, then α, σ of each step and α', σ' that it goes to.

    DDIM goes T // S timesteps below, LCM to the level of the next step.
    """
    levels, timesteps = config.noise.alphas_cumprod(), _timesteps(config)
    index, T = timesteps.astype(np.int64), config.noise.train_timesteps
    require(index[0] < T, "steps_offset", f"timesteps below {T}", int(index[0]), "Lower it.")
    below = np.append(index[1:], -1) if config.solver == "lcm" else index - T // config.steps
    end = 1.0 if config.set_alpha_to_one else levels[0]
    here, there = levels[index], np.where(below >= 0, levels[np.maximum(below, 0)], end)
    return timesteps, np.sqrt(here), np.sqrt(1 - here), np.sqrt(there), np.sqrt(1 - there)


def _sigma_levels(config: SolverConfig) -> tuple[Float64, ...]:
    """As ``_ddim_levels``, where each step goes to the level of the next one."""
    training, multistep = config.noise.sigmas(), config.solver in MULTISTEP
    times, timesteps = np.arange(len(training)), _timesteps(config)
    ratio = np.interp(timesteps, times, training)  # σ/α
    if config.karras:
        high, low = (training[[-1, 0]] if multistep else ratio[[0, -1]]) ** (1 / 7)
        ratio = (high + np.linspace(0, 1, config.steps) * (low - high)) ** 7
        timesteps = np.interp(np.log(ratio), np.log(training.astype(np.float32)), times)
        cosine = config.noise.beta_schedule == "squaredcos_cap_v2"
        whole = np.trunc if cosine and config.solver != "unipc" else np.round
        timesteps = whole(timesteps) if multistep else timesteps
    least = ratio[-1] if config.karras and config.solver == "unipc" else training[0]
    ratio = np.append(ratio, 0.0 if config.final_sigma == "zero" else least)
    return timesteps, *_from_ratios(ratio)


def solver_step_numpy(
    row: Float32, guidance_scale: float | None, sample: Float32, previous_x0: Float32 | None,
    earlier_x0: Float32 | None, model_output: Float32, next_input: Float32 | None,
    scratch: Float32, noise: Float32 | None = None,
) -> None:  # fmt: skip
    """Run one table row in place: ``sample`` [N, M] becomes the next step's.

    The step's own x0 takes the place of ``earlier_x0`` [N, M], so that the next step finds it as
    its ``previous_x0`` with the two exchanged; both are None for a solver that keeps none.
    ``model_output`` is [N, M], or with guidance [2N, M], the unconditional half first; likewise
    ``next_input``, whose parts are equal. ``scratch`` [N, M] is overwritten; ``noise`` [N, M] is
    read where the row adds any. Nothing is allocated.
    """
    if earlier_x0 is None or previous_x0 is None:
        sample *= row[0]
    else:
        scratch.fill(0)
        if row[2]:  # what no step has written may be NaN
            np.multiply(previous_x0, row[2], out=scratch)
        if row[3]:
            earlier_x0 *= row[3]
            scratch += earlier_x0
        np.multiply(sample, row[4], out=earlier_x0)
        sample *= row[0]
        sample += scratch
        earlier_x0 += _guided(model_output, guidance_scale, row[5], scratch)
    sample += _guided(model_output, guidance_scale, row[1], scratch)
    if row[7]:
        assert noise is not None
        sample += np.multiply(noise, row[7], out=scratch)
    if next_input is not None:
        parts = next_input.reshape(-1, *sample.shape)
        np.multiply(sample, row[6], out=parts[0])
        parts[1:] = parts[0]


def _guided(output: Float32, scale: float | None, factor: np.float32, out: Float32) -> Float32:
    """Put factor · (u + scale · (c - u)) of the halves u, c into ``out``; Ho and Salimans 2022."""
    N = len(out)
    if scale is None or len(output) == N:
        return np.multiply(output, factor, out=out)
    np.subtract(output[N:], output[:N], out=out)
    out *= scale
    out += output[:N]
    out *= factor
    return out
