"""Diffusion ODE solvers as tables of coefficients: DDIM, DPM-Solver++ (2M) and Euler.

A step is linear in the sample x, the guided model output g and, for DPM, the data prediction h of
the step before. It goes from a noise level (α, σ) to the next (α', σ') by

    x' = (σ'/σ) x + (α' - α σ'/σ) ((1 + k) x0 - k h),      x0 linear in x and g.

DDIM: k = 0 (Song et al. 2021, eq. 12, σ_t = 0). DPM-Solver++ 2M: k = half the ratio of this step
to the last in log(α/σ) (Lu et al. 2022, alg. 2). Euler: k = 0 on x/α (Karras et al. 2022, alg. 1).
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

SOLVERS = ("ddim", "dpm", "euler")

READ_BY: dict[str, tuple[str, ...]] = {
    "set_alpha_to_one": ("ddim",),
    **dict.fromkeys(("karras", "final_sigma"), ("dpm", "euler")),
    **dict.fromkeys(("lower_order_final", "euler_at_final"), ("dpm",)),
}
"""Options that only some solvers read; with the others they keep their default."""

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

    ``dpm`` is DPM-Solver++ 2M, midpoint. ``spacing``: Lin et al. 2024, table 2; ``steps_offset``
    shifts ``leading``. ``set_alpha_to_one``: DDIM ends noise-free, not at the first training
    level. ``karras``: sigmas of Karras et al. 2022, eq. 5. ``lower_order_final``: a first-order
    last step below 15 steps; ``euler_at_final``: always. ``final_sigma``: where dpm and euler end.
    ``grid``: the noise levels themselves, in place of all that would derive them; every solver then
    ends noise-free.

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

    def __post_init__(self) -> None:
        check_types(self, _CHOICES)
        T = self.noise.train_timesteps
        if self.grid is not None:
            self._check_grid(self.grid)
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

    def to_json(self) -> dict[str, Any]:
        """Every option, as values that JSON has."""
        return {**asdict(self), "grid": None if self.grid is None else self.grid.to_json()}

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

    A row is c_sample, c_model, c_previous, 0, d_sample, d_model, next_input_scale, 0. With h the x0
    that the step before predicted, the step makes x' = c_sample x + c_model g + c_previous h, then
    h' = d_sample x + d_model g, and the model sees next_input_scale x'. Where c_previous is 0, h is
    never read. (The kernels could read two tensors of this kind: their previous_x0 and earlier_x0.)
    """

    timesteps: Float32  # [S], what the model is conditioned on; fractional for some Euler steps
    coefficients: Float32  # [S, 8]
    first: Float32  # [S, 8], the row of a step that is the first one executed: no h yet
    input_scale: Float32  # [S], model input = input_scale * sample
    noising: Float32  # [S, 2], sample of the step = noising[:, 0] * x0 + noising[:, 1] * noise
    initial_scale: float  # sample at step 0 = initial_scale * standard normal noise


def solver_tables(config: SolverConfig) -> SolverTables:
    """The tables of ``config``; ConfigError where a step of it would not be finite.

    Examples:
        >>> solver_tables(SolverConfig(solver="ddim", steps=2)).timesteps.tolist()
        [500.0, 0.0]
    """
    timesteps, alpha, sigma, alpha_to, sigma_to = _visited_levels(config)
    kept, weight = sigma_to / sigma, alpha_to - alpha * sigma_to / sigma
    p_sample, p_model = _data_prediction(config.prediction, alpha, sigma)
    one, multistep = np.ones_like(alpha), float(config.solver == "dpm")
    # Euler's sample is x/α: c_sample and c_model change unit, from this level's to the next one's.
    scale, scale_to = (alpha, alpha_to) if config.solver == "euler" else (one, one)

    def rows(k: Float64) -> Float32:
        c_sample = (kept + weight * (1 + k) * p_sample) * scale / scale_to
        c_model, c_previous = weight * (1 + k) * p_model / scale_to, -weight * k
        prediction = multistep * p_sample, multistep * p_model
        next_scale = np.append(scale[1:], 1.0)
        columns = (c_sample, c_model, c_previous, 0 * one, *prediction, next_scale, 0 * one)
        return np.stack(columns, axis=1).astype(np.float32)

    initial = 1 / scale[0] if config.spacing == "leading" else np.max(sigma / scale)
    return SolverTables(
        timesteps=timesteps.astype(np.float32),
        coefficients=rows(_extrapolation(config, alpha, sigma, alpha_to, sigma_to)),
        first=rows(0 * one),
        input_scale=scale.astype(np.float32),
        noising=np.stack([alpha / scale, sigma / scale], axis=1).astype(np.float32),
        initial_scale=float(initial) if config.solver == "euler" else 1.0,
    )


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
    k, low_end = np.zeros_like(levels[0]), config.lower_order_final and config.steps < 15
    if config.solver == "dpm":
        low_end |= config.euler_at_final or config.final_sigma == "zero"
        end = config.steps - low_end
        alpha, sigma, alpha_to, sigma_to = (level[:end] for level in levels)
        h = np.log(alpha_to * sigma / (alpha * sigma_to))
        require(np.all(h[:-1] > 0), "steps", "noise to fall at each", config.steps, "Use fewer.")
        k[1:end] = h[1:] / h[:-1] / 2
    return k


def _timesteps(config: SolverConfig) -> Float64:
    """The spaced timesteps, falling, float64 [S]; DPM leaves out the last of S + 1."""
    T, S = config.noise.train_timesteps, config.steps
    points = S + 1 if config.solver == "dpm" else S
    if config.spacing == "leading":
        spaced = np.arange(points)[::-1][:S] * float(T // points) + config.steps_offset
    elif config.spacing == "linspace":
        spaced = np.linspace(0, T - 1, points)[::-1][:S]
        spaced = spaced.astype(np.float32) if config.solver == "euler" else np.round(spaced)
    else:
        spaced = np.round(np.arange(T, 0, -T / S)) - 1
    require(len(spaced) == S, "steps", "a number that 'trailing' can do", S, "Take one less.")
    return spaced.astype(np.float64)


def _visited_levels(config: SolverConfig) -> tuple[Float64, ...]:
    """Timesteps, then α, σ of each step and α', σ' that it goes to; all [S]."""
    if config.grid is not None:
        sigmas = np.append(np.asarray(config.grid.sigmas, np.float64), 0.0)
        return np.asarray(config.grid.timesteps, np.float64), *_from_ratios(sigmas)
    return _ddim_levels(config) if config.solver == "ddim" else _sigma_levels(config)


def _from_ratios(ratio: Float64) -> tuple[Float64, Float64, Float64, Float64]:
    """α, σ and α', σ' of steps between neighbours of σ/α, float64 [S + 1]."""
    ratio = ratio.astype(np.float32).astype(np.float64)
    alpha = 1 / np.sqrt(1 + ratio**2)
    sigma = ratio * alpha
    return alpha[:-1], sigma[:-1], alpha[1:], sigma[1:]


def _ddim_levels(config: SolverConfig) -> tuple[Float64, ...]:
    """Timesteps, then α, σ of each step and α', σ' that it goes to: T // S timesteps below."""
    levels, timesteps = config.noise.alphas_cumprod(), _timesteps(config)
    index, T = timesteps.astype(np.int64), config.noise.train_timesteps
    require(index[0] < T, "steps_offset", f"timesteps below {T}", int(index[0]), "Lower it.")
    below = index - T // config.steps
    end = 1.0 if config.set_alpha_to_one else levels[0]
    here, there = levels[index], np.where(below >= 0, levels[np.maximum(below, 0)], end)
    return timesteps, np.sqrt(here), np.sqrt(1 - here), np.sqrt(there), np.sqrt(1 - there)


def _sigma_levels(config: SolverConfig) -> tuple[Float64, ...]:
    """As ``_ddim_levels``, where each step goes to the level of the next one."""
    training, dpm = config.noise.sigmas(), config.solver == "dpm"
    times, timesteps = np.arange(len(training)), _timesteps(config)
    ratio = np.interp(timesteps, times, training)  # σ/α
    if config.karras:
        high, low = (training[[-1, 0]] if dpm else ratio[[0, -1]]) ** (1 / 7)
        ratio = (high + np.linspace(0, 1, config.steps) * (low - high)) ** 7
        timesteps = np.interp(np.log(ratio), np.log(training.astype(np.float32)), times)
        whole = np.trunc if config.noise.beta_schedule == "squaredcos_cap_v2" else np.round
        timesteps = whole(timesteps) if dpm else timesteps
    ratio = np.append(ratio, 0.0 if config.final_sigma == "zero" else training[0])
    return timesteps, *_from_ratios(ratio)


def solver_step_numpy(
    row: Float32, guidance_scale: float | None, sample: Float32, previous_x0: Float32 | None,
    model_output: Float32, next_input: Float32 | None, scratch: Float32,
) -> None:  # fmt: skip
    """Run one table row in place: ``sample`` and ``previous_x0`` [N, M] become the next step's.

    ``model_output`` is [N, M], or with guidance [2N, M], the unconditional half first; likewise
    ``next_input``, whose halves are equal. ``scratch`` [N, M] is overwritten. Nothing is allocated.
    """
    if previous_x0 is None:
        sample *= row[0]
    else:
        scratch.fill(0)
        if row[2]:  # what no step has written may be NaN
            np.multiply(previous_x0, row[2], out=scratch)
        np.multiply(sample, row[4], out=previous_x0)
        sample *= row[0]
        sample += scratch
        previous_x0 += _guided(model_output, guidance_scale, row[5], scratch)
    sample += _guided(model_output, guidance_scale, row[1], scratch)
    if next_input is not None:
        np.multiply(sample, row[6], out=next_input[: len(sample)])
        next_input[len(sample) :] = next_input[: len(next_input) - len(sample)]


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
