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
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from blockcache.runtime.errors import ConfigError
from blockcache.runtime.grid import Grid

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
_Config = TypeVar("_Config", "NoiseSchedule", "SolverConfig")

_ALL = ("ddim", "dpm", "euler")
_CHOICES = {
    "solver": _ALL,
    "prediction": ("epsilon", "v_prediction", "sample"),
    "spacing": ("leading", "trailing", "linspace"),
    "final_sigma": ("zero", "sigma_min"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
}
# Options, ours and diffusers', that only some solvers read. Ours keep their default elsewhere.
_READ_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("set_alpha_to_one", "clip_sample"), ("ddim",)),
    **dict.fromkeys(("karras", "final_sigma"), ("dpm", "euler")),
    **dict.fromkeys(("lower_order_final", "euler_at_final", "lambda_min_clipped"), ("dpm",)),
    **dict.fromkeys(("algorithm_type", "solver_order", "solver_type"), ("dpm",)),
    **dict.fromkeys(("timestep_type", "interpolation_type", "sigma_min", "sigma_max"), ("euler",)),
}
# What decides where the levels lie, unless a grid says it.
_DERIVES_LEVELS = ("spacing", "steps_offset", "set_alpha_to_one", "karras", "final_sigma")
# diffusers' options that change the result, and the values that we support.
_SUPPORTED: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("thresholding", "clip_sample", "use_flow_sigmas", "use_lu_lambdas"), (False,)),
    **dict.fromkeys(("use_exponential_sigmas", "use_beta_sigmas"), (False,)),
    **dict.fromkeys(("sigma_min", "sigma_max", "snr_shift_scale"), (None,)),
    **{"solver_order": (2,), "timestep_type": ("discrete",), "interpolation_type": ("linear",)},
    "algorithm_type": ("dpmsolver++", "deis"),  # diffusers reads deis as dpmsolver++
    "solver_type": ("midpoint", "logrho", "bh1", "bh2"),  # and the last three as midpoint
    "lambda_min_clipped": (-np.inf,),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}
_RENAMED = {
    "num_train_timesteps": "train_timesteps",
    "rescale_betas_zero_snr": "rescale_zero_snr",
    "prediction_type": "prediction",
    "timestep_spacing": "spacing",
    "use_karras_sigmas": "karras",
    "final_sigmas_type": "final_sigma",
}
_CLASSES = {"DPMSolverMultistepScheduler": "dpm", "EulerDiscreteScheduler": "euler"}
_CLASSES |= dict.fromkeys(("DDIMScheduler", "DDPMScheduler", "PNDMScheduler"), "ddim")


def _require(allowed: bool | np.bool_, name: str, wanted: object, got: object, advice: str) -> None:
    if not allowed:
        raise ConfigError(f"{name}: expected {wanted}, got {got!r}. {advice}")


def _check_types(config: NoiseSchedule | SolverConfig) -> None:
    for item in fields(config):
        value, least = getattr(config, item.name), int(item.name != "steps_offset")
        checks = {
            "str": (value in _CHOICES.get(item.name, ()), f"one of {_CHOICES.get(item.name)}"),
            "bool": (isinstance(value, bool), "true or false"),
            "int": (type(value) is int and value >= least, f"a whole number >= {least}"),
            "float": (type(value) in (int, float) and 0 < value < 1, "a number between 0 and 1"),
        }
        allowed, wanted = checks.get(str(item.type), (True, ""))
        _require(allowed, item.name, wanted, value, "Correct it.")


def _from_mapping(cls: type[_Config], mapping: Mapping[str, Any]) -> _Config:
    """``cls(**mapping)``, where unknown and missing keys are a ConfigError."""
    try:
        return cls(**mapping)
    except TypeError as error:
        wanted = [item.name for item in fields(cls)]
        raise ConfigError(f"Expected {wanted}, got {mapping!r}. Correct it: {error}.") from error


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """The training noise schedule, by its betas (Ho et al. 2020, eq. 2).

    ``trained_betas`` replace the formula; ``rescale_zero_snr``: Lin et al. 2024, alg. 1.
    """

    train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_zero_snr: bool = False

    def __post_init__(self) -> None:
        _check_types(self)
        if self.trained_betas is not None:
            object.__setattr__(self, "trained_betas", tuple(map(float, self.trained_betas)))
            count, T = len(self.trained_betas), self.train_timesteps
            _require(count == T, "trained_betas", f"{T} (train_timesteps)", count, "Correct it.")
        levels = self.alphas_cumprod()
        noisy = levels[:-1] if self.rescale_zero_snr else levels
        falling = np.all((noisy > 0) & (noisy < 1)) and np.all(np.diff(levels) < 0)
        wanted = "1 - beta whose products fall, in float32, from below 1 to above 0"
        _require(falling, "noise", wanted, levels[[0, -1]].tolist(), "Correct the betas.")

    def alphas_cumprod(self) -> Float64:
        """Cumulative product of 1 - beta (α²), float64 [T]; the last is 0 at zero terminal SNR."""
        levels = _cumulative_product(self._betas())
        if self.rescale_zero_snr:
            root = np.sqrt(levels)
            root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
            squared = root * root
            ratios = np.append(squared[:1], squared[1:] / squared[:-1])
            levels = _cumulative_product(np.float32(1) - ratios)
        return levels.astype(np.float64)

    def sigmas(self) -> Float64:
        """Noise-to-signal ratio σ/α, float64 [T]; the last is 4096 at zero terminal SNR."""
        levels = self.alphas_cumprod().astype(np.float32)
        if self.rescale_zero_snr:
            levels[-1] = 2.0**-24  # as diffusers, so that it is finite
        return np.asarray(np.sqrt((np.float32(1) - levels) / levels), dtype=np.float64)

    def _betas(self) -> Float32:
        T = self.train_timesteps
        if self.trained_betas is not None:
            return np.asarray(self.trained_betas, dtype=np.float32)
        if self.beta_schedule == "squaredcos_cap_v2":
            bar = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
            return np.asarray(np.minimum(1 - bar[1:] / bar[:-1], 0.999), dtype=np.float32)
        power = 2 if self.beta_schedule == "scaled_linear" else 1
        root = _linspace32(self.beta_start ** (1 / power), self.beta_end ** (1 / power), T)
        return np.asarray(root**power, dtype=np.float32)


def _cumulative_product(betas: Float32) -> Float32:
    return np.cumprod((np.float32(1) - betas).astype(np.float64)).astype(np.float32)


def _linspace32(start: float, end: float, count: int) -> Float32:
    """torch.linspace in float32: float32 ends and step, each half counted from its own end."""
    first, last, index = np.float32(start), np.float32(end), np.arange(count)
    step = float((last - first) / np.float32(max(count - 1, 1)))
    low, high = float(first) + step * index, float(last) - step * (count - 1 - index)
    return np.where(index < max(count // 2, 1), low, high).astype(np.float32)


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
        _check_types(self)
        T = self.noise.train_timesteps
        if self.grid is not None:
            self._check_grid(self.grid)
        _require(self.steps <= T, "steps", f"at most {T}", self.steps, "Training had no more.")
        for item in fields(self):
            value, readers = getattr(self, item.name), _READ_BY.get(item.name, _ALL)
            read, wanted = self.solver in readers, f"{item.default!r} with solver {self.solver!r}"
            advice = f"Only {' and '.join(readers)} read it: leave it out."
            _require(read or value == item.default, item.name, wanted, value, advice)

    def _check_grid(self, grid: Grid) -> None:
        """A grid fits the steps, and nothing else says where they lie."""
        S, T = self.steps, self.noise.train_timesteps
        _require(grid.steps == S, "grid", f"{S} levels, one a step", grid.steps, "Correct it.")
        wanted = f"timesteps below {T} (train_timesteps)"
        _require(max(grid.timesteps) < T, "grid", wanted, max(grid.timesteps), "Correct it.")
        for name in _DERIVES_LEVELS:
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            _require(value == default, name, f"{default!r} beside a grid", value, "Leave it out.")

    @classmethod
    def from_diffusers(
        cls, scheduler_config: Mapping[str, Any], *, solver: str | None = None, steps: int,
        spacing: str | None = None, grid: Grid | None = None,
    ) -> SolverConfig:  # fmt: skip
        """Read a ``scheduler_config.json`` of diffusers, whichever scheduler wrote it.

        It means what ``Target.from_config`` makes of it there: an absent option has the target's
        default, except that an absent ``clip_sample`` is true only for DDIM and DDPM. ``solver``
        None: the class's own (DDPM, PNDM: ddim). ``spacing`` and ``grid`` take the place of where
        the config puts the levels. ConfigError names what would change the result.
        """
        unset = scheduler_config.get("_use_default_values", ())
        given = {k: v for k, v in scheduler_config.items() if k not in unset and v is not None}
        solver = solver or _CLASSES.get(str(scheduler_config.get("_class_name")), "")
        _refuse_unsupported(scheduler_config, given, solver)
        given = {_RENAMED.get(key, key): value for key, value in given.items()}
        noise = {f.name: given[f.name] for f in fields(NoiseSchedule) if f.name in given}
        read = [f.name for f in fields(cls) if solver in _READ_BY.get(f.name, _ALL)]
        options: dict[str, Any] = {"spacing": "leading" if solver == "ddim" else "linspace"}
        options |= {name: given[name] for name in read if name in given}
        options |= {} if spacing is None else {"spacing": spacing}
        if spacing is not None or grid is not None:
            options.pop("karras", None)
        if grid is not None:
            options = {k: v for k, v in options.items() if k not in _DERIVES_LEVELS}
        return cls(solver=solver, steps=steps, noise=NoiseSchedule(**noise), grid=grid, **options)

    def to_json(self) -> dict[str, Any]:
        """Every option, as values that JSON has."""
        return {**asdict(self), "grid": None if self.grid is None else self.grid.to_json()}

    @classmethod
    def from_json(cls, mapping: Mapping[str, Any]) -> SolverConfig:
        """The inverse of ``to_json``; unknown and missing keys are a ConfigError."""
        if isinstance(mapping, Mapping) and "noise" in mapping:
            mapping = {**mapping, "noise": _from_mapping(NoiseSchedule, mapping["noise"])}
        if isinstance(mapping, Mapping) and mapping.get("grid") is not None:
            mapping = {**mapping, "grid": Grid.from_json(mapping["grid"])}
        return _from_mapping(cls, mapping)


def _refuse_unsupported(source: Mapping[str, Any], given: Mapping[str, Any], solver: str) -> None:
    name, advice = source.get("_class_name"), "Name one: this scheduler stands for none."
    _require(solver in _ALL, "solver", f"one of {_ALL} for {name}", solver, advice)
    betas, advice = {"beta_schedule", "trained_betas"} & set(source), "Use a DDPM-like model."
    _require(bool(betas), "beta_schedule", "the noise schedule of the training", name, advice)
    if name in ("DDIMScheduler", "DDPMScheduler"):
        given = {"clip_sample": True, **given}
    for key, values in _SUPPORTED.items():
        if key in given and solver in _READ_BY.get(key, _ALL):
            advice = f"Solver {solver!r} has nothing else; change it only if the model allows."
            _require(given[key] in values, key, f"one of {values}", given[key], advice)


@dataclass(frozen=True, eq=False)
class SolverTables:
    """A solver bound to its steps: tables indexed by step 0 ... S-1.

    A row is c_sample, c_model, c_history0, c_history1, d_sample, d_model, next_input_scale, 0:
    x' = c_sample x + c_model g + c_history0 h0 + c_history1 h1, then h0' = d_sample x + d_model g,
    and the model sees next_input_scale x'. A history whose coefficient is 0 is never read.
    """

    timesteps: Float32  # [S], what the model is conditioned on; fractional for some Euler steps
    coefficients: Float32  # [S, 8]
    first: Float32  # [S, 8], the row of a step that is the first one executed: no history yet
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
    one, history = np.ones_like(alpha), float(config.solver == "dpm")
    # Euler's sample is x/α: c_sample and c_model change unit, from this level's to the next one's.
    scale, scale_to = (alpha, alpha_to) if config.solver == "euler" else (one, one)

    def rows(k: Float64) -> Float32:
        c_sample = (kept + weight * (1 + k) * p_sample) * scale / scale_to
        c_model, c_history = weight * (1 + k) * p_model / scale_to, -weight * k
        prediction, next_scale = (history * p_sample, history * p_model), np.append(scale[1:], 1.0)
        columns = (c_sample, c_model, c_history, 0 * one, *prediction, next_scale, 0 * one)
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
    _require(np.all(alpha > 0), "prediction", wanted, prediction, advice)
    return 1 / alpha, -sigma / alpha


def _extrapolation(config: SolverConfig, *levels: Float64) -> Float64:
    """The k of each step, float64 [S], from its α, σ, α', σ': 0 where it is of first order."""
    k, low_end = np.zeros_like(levels[0]), config.lower_order_final and config.steps < 15
    if config.solver == "dpm":
        low_end |= config.euler_at_final or config.final_sigma == "zero"
        end = config.steps - low_end
        alpha, sigma, alpha_to, sigma_to = (level[:end] for level in levels)
        h = np.log(alpha_to * sigma / (alpha * sigma_to))
        _require(np.all(h[:-1] > 0), "steps", "noise to fall at each", config.steps, "Use fewer.")
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
    _require(len(spaced) == S, "steps", "a number that 'trailing' can do", S, "Take one less.")
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
    _require(index[0] < T, "steps_offset", f"timesteps below {T}", int(index[0]), "Lower it.")
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
    row: Float32, guidance_scale: float | None, sample: Float32, history: Float32 | None,
    model_output: Float32, next_input: Float32 | None, scratch: Float32,
) -> None:  # fmt: skip
    """Run one table row in place: ``sample`` and ``history`` [N, M] become the next step's.

    ``model_output`` is [N, M], or with guidance [2N, M], the unconditional half first; likewise
    ``next_input``, whose halves are equal. ``scratch`` [N, M] is overwritten. Nothing is allocated.
    """
    if history is None:
        sample *= row[0]
    else:
        scratch.fill(0)
        if row[2]:  # an unwritten history may hold NaN
            np.multiply(history, row[2], out=scratch)
        np.multiply(sample, row[4], out=history)
        sample *= row[0]
        sample += scratch
        history += _guided(model_output, guidance_scale, row[5], scratch)
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
