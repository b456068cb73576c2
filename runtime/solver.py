"""Diffusion ODE solvers as tables of coefficients: DDIM, DPM-Solver++ (2M) and Euler.

A step is linear in the sample x, the guided model output g and, for DPM, the data prediction h of
the step before. It goes from a noise level (α, σ) to the next (α', σ') by

    x' = (σ'/σ) x + (α' - α σ'/σ) ((1 + k) x0 - k h),      x0 linear in x and g.

DDIM: k = 0 (Song et al. 2021, eq. 12, σ_t = 0). DPM-Solver++ 2M: k = half the ratio of this step
to the last in log(α/σ) (Lu et al. 2022, alg. 2). Euler: k = 0 on the sample x/α (Karras et al.
2022, alg. 1 without churn). The noise levels are those of diffusers to the last bit: it keeps the
training schedule in float32, where the rounding of 1 - beta moves the levels near t = 0 by parts
in ten thousand. Everything after them is float64, the tables are float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from blockcache.runtime.errors import ConfigError

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
    **dict.fromkeys(("karras", "final_sigma", "use_exponential_sigmas"), ("dpm", "euler")),
    **dict.fromkeys(("use_beta_sigmas",), ("dpm", "euler")),
    **dict.fromkeys(("lower_order_final", "euler_at_final", "use_lu_lambdas"), ("dpm",)),
    **dict.fromkeys(("algorithm_type", "solver_order", "solver_type"), ("dpm",)),
    **dict.fromkeys(("lambda_min_clipped",), ("dpm",)),
    **dict.fromkeys(("timestep_type", "interpolation_type", "sigma_min", "sigma_max"), ("euler",)),
}
# diffusers options that change the result, and the values that we support.
_FLAGS = ("thresholding", "clip_sample", "use_flow_sigmas", "use_exponential_sigmas")
_SUPPORTED: dict[str, tuple[object, ...]] = {
    **dict.fromkeys((*_FLAGS, "use_beta_sigmas", "use_lu_lambdas"), (False,)),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    "algorithm_type": ("dpmsolver++", "deis"),  # diffusers reads deis as dpmsolver++
    "solver_type": ("midpoint", "logrho", "bh1", "bh2"),  # and the last three as midpoint
    **{"solver_order": (2,), "timestep_type": ("discrete",), "interpolation_type": ("linear",)},
    **{"sigma_min": (None,), "sigma_max": (None,)},
}
# diffusers' names of our options; absent or null means the default, which is the same there.
_SAME = ("steps_offset", "set_alpha_to_one", "lower_order_final", "euler_at_final")
_SOLVER_KEYS = {name: name for name in _SAME} | {
    **{"use_karras_sigmas": "karras", "final_sigmas_type": "final_sigma"},
    "prediction_type": "prediction",
}
_NOISE_KEYS = {name: name for name in ("beta_start", "beta_end", "beta_schedule", "trained_betas")}
_NOISE_KEYS |= {"num_train_timesteps": "train_timesteps"}
_NOISE_KEYS |= {"rescale_betas_zero_snr": "rescale_zero_snr"}
# diffusers classes whose options mean the same, and the solver each stands for ("": not ours).
_CLASSES = {
    **{"DDIM": "ddim", "DDPM": "ddim", "PNDM": "ddim"},
    **{"DPMSolverMultistep": "dpm", "EulerDiscrete": "euler"},
    **dict.fromkeys(("DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep"), ""),
    **dict.fromkeys(("LMSDiscrete", "HeunDiscrete", "EulerAncestralDiscrete"), ""),
    **dict.fromkeys(("KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE"), ""),
}


def _require(allowed: bool, name: str, wanted: object, got: object, advice: str) -> None:
    if not allowed:
        raise ConfigError(f"{name}: expected {wanted}, got {got!r}. {advice}")


def _check_types(config: NoiseSchedule | SolverConfig) -> None:
    for item in fields(config):
        value, least = getattr(config, item.name), int(item.name != "steps_offset")
        if item.name in _CHOICES:
            allowed, wanted = value in _CHOICES[item.name], f"one of {_CHOICES[item.name]}"
        elif item.type == "bool":
            allowed, wanted = isinstance(value, bool), "true or false"
        elif item.type == "int":
            allowed, wanted = type(value) is int and value >= least, f"a whole number >= {least}"
        elif item.type == "float":
            allowed, wanted = type(value) in (int, float) and 0 < value < 1, "0 < beta < 1"
        else:
            continue
        _require(allowed, item.name, wanted, value, "Correct it.")


def _from_mapping(cls: type[_Config], mapping: Mapping[str, Any]) -> _Config:
    """``cls(**mapping)``, where unknown and missing keys are a ConfigError."""
    known = {item.name for item in fields(cls)}
    needed = known - {i.name for i in fields(cls) if not (i.default is i.default_factory is MISSING)}
    keys = set(mapping) if isinstance(mapping, Mapping) else {repr(mapping)}
    wanted = f"the keys {sorted(needed)} and any of {sorted(known - needed)}"
    _require(needed <= keys <= known, cls.__name__, wanted, sorted(keys), "Correct the keys.")
    return cls(**mapping)


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """The training noise schedule, by the betas of DDPM (Ho et al. 2020).

    ``trained_betas`` replaces the formula. ``rescale_zero_snr`` makes the last level pure noise
    (Lin et al. 2024, alg. 1).
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
            _require(count == T, "trained_betas", f"train_timesteps = {T} values", count, "Add them.")
        levels = self.alphas_cumprod()
        noisy = levels[:-1] if self.rescale_zero_snr else levels
        falling = bool(np.all((noisy > 0) & (noisy < 1)) and np.all(np.diff(levels) < 0))
        wanted = "1 - beta whose products fall, in float32, from below 1 to above 0"
        _require(falling, "noise", wanted, levels[[0, -1]].tolist(), "Correct the betas.")

    def alphas_cumprod(self) -> Float64:
        """Cumulative product of 1 - beta (α²), float64 [T]; the last is 0 at zero terminal SNR."""
        levels = _cumulative_product(self._betas())
        if self.rescale_zero_snr:
            with np.errstate(invalid="ignore", divide="ignore"):
                root = np.sqrt(levels)
                root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
                squared = root * root
                ratios = np.concatenate([squared[:1], squared[1:] / squared[:-1]])
            levels = _cumulative_product(np.float32(1) - ratios)
        return levels.astype(np.float64)

    def sigmas(self) -> Float64:
        """Noise-to-signal ratio σ/α, float64 [T]; the last is 4096 at zero terminal SNR."""
        levels = self.alphas_cumprod().astype(np.float32)
        if self.rescale_zero_snr:
            levels[-1] = 2.0**-24  # as diffusers, so that it is finite
        return np.sqrt((np.float32(1) - levels) / levels).astype(np.float64)

    def _betas(self) -> Float32:
        T = self.train_timesteps
        if self.trained_betas is not None:
            return np.asarray(self.trained_betas, dtype=np.float32)
        if self.beta_schedule == "linear":
            return _linspace32(self.beta_start, self.beta_end, T)
        if self.beta_schedule == "scaled_linear":
            root = _linspace32(self.beta_start**0.5, self.beta_end**0.5, T)
            return root * root
        bar = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - bar[1:] / bar[:-1], 0.999).astype(np.float32)


def _cumulative_product(betas: Float32) -> Float32:
    """The product of 1 - beta up to each timestep: float32 factors, carried in float64."""
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

    def __post_init__(self) -> None:
        _check_types(self)
        T = self.noise.train_timesteps
        wanted = f"at most the {T} training timesteps"
        _require(self.steps <= T, "steps", wanted, self.steps, "Use fewer steps.")
        for item in fields(self):
            value, readers = getattr(self, item.name), _READ_BY.get(item.name, _ALL)
            read, wanted = self.solver in readers, f"{item.default!r} with solver {self.solver!r}"
            advice = f"Only {' and '.join(readers)} read it: leave it out."
            _require(read or value == item.default, item.name, wanted, value, advice)

    @classmethod
    def from_diffusers(
        cls, scheduler_config: Mapping[str, Any], *, solver: str | None = None, steps: int,
        spacing: str | None = None,
    ) -> SolverConfig:  # fmt: skip
        """Read a ``scheduler_config.json`` of diffusers, whichever scheduler wrote it.

        It means what ``Target.from_config`` of diffusers makes of it: an absent option has the
        target's default; but an absent ``clip_sample`` is true only where the class has that
        default (DDIM, DDPM). ``solver`` None is the one that the class stands for (DDPM and PNDM:
        ddim). ConfigError names what we do not support and would change the result.

        Examples:
            >>> SolverConfig.from_diffusers({"_class_name": "PNDMScheduler"}, steps=20).solver
            'ddim'
        """
        unset = {"_use_default_values", *scheduler_config.get("_use_default_values", ())}
        source = {k: v for k, v in scheduler_config.items() if k not in unset and v is not None}
        solver = _target_solver(source.get("_class_name"), solver)
        noise = NoiseSchedule(**{_NOISE_KEYS[k]: v for k, v in source.items() if k in _NOISE_KEYS})
        _refuse_unsupported(source, solver, noise)
        options = {_SOLVER_KEYS[k]: v for k, v in source.items() if k in _SOLVER_KEYS}
        options = {k: v for k, v in options.items() if solver in _READ_BY.get(k, _ALL)}
        default = "leading" if solver == "ddim" else "linspace"
        spacing = spacing or source.get("timestep_spacing", default)
        return cls(solver=solver, steps=steps, spacing=spacing, noise=noise, **options)

    def to_json(self) -> dict[str, Any]:
        """Every option, as plain JSON values."""
        betas = self.noise.trained_betas
        noise = {**asdict(self.noise), "trained_betas": None if betas is None else list(betas)}
        return {**asdict(self), "noise": noise}

    @classmethod
    def from_json(cls, mapping: Mapping[str, Any]) -> SolverConfig:
        """The inverse of ``to_json``; unknown and missing keys are a ConfigError."""
        if isinstance(mapping, Mapping) and "noise" in mapping:
            mapping = {**mapping, "noise": _from_mapping(NoiseSchedule, mapping["noise"])}
        return _from_mapping(cls, mapping)


def _target_solver(class_name: str | None, solver: str | None) -> str:
    name = (class_name or "DDIMScheduler").removesuffix("Scheduler")
    wanted = f"one of {sorted(_CLASSES)} + 'Scheduler'"
    _require(name in _CLASSES, "_class_name", wanted, class_name, "Use a model trained for these.")
    found = solver or (_CLASSES[name] if class_name else "")
    advice = f"The scheduler {class_name} stands for none: name one."
    _require(found in _ALL, "solver", f"one of {_ALL}", solver, advice)
    return found


def _refuse_unsupported(source: Mapping[str, Any], solver: str, noise: NoiseSchedule) -> None:
    if source.get("_class_name") in ("DDIMScheduler", "DDPMScheduler"):
        source = {"clip_sample": True, **source}
    advice = "It changes the images: set it so only if the model was made for that."
    for key in source.keys() & _SUPPORTED.keys():
        wanted = f"one of {_SUPPORTED[key]} with solver {solver!r}"
        unread, value = solver not in _READ_BY.get(key, _ALL), source[key]
        _require(unread or value in _SUPPORTED[key], key, wanted, value, advice)
    lowest, clip = -np.log(noise.sigmas()[-1]), float(source.get("lambda_min_clipped", -np.inf))
    wanted = f"at most {lowest:.4f}, the lowest log(α/σ) of the schedule"
    _require(solver != "dpm" or clip <= lowest, "lambda_min_clipped", wanted, clip, advice)


@dataclass(frozen=True, eq=False)
class SolverTables:
    """A solver bound to its steps: read-only tables, indexed by step 0 ... S-1.

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

    def __post_init__(self) -> None:
        for item in fields(self)[:-1]:
            getattr(self, item.name).setflags(write=False)


def solver_tables(config: SolverConfig) -> SolverTables:
    """The tables of ``config``; ConfigError where a step of it would not be finite.

    Examples:
        >>> solver_tables(SolverConfig(solver="ddim", steps=2)).timesteps.tolist()
        [500.0, 0.0]
    """
    visited = _ddim_levels if config.solver == "ddim" else _sigma_levels
    timesteps, alpha, sigma, alpha_to, sigma_to = visited(config)
    kept, weight = sigma_to / sigma, alpha_to - alpha * sigma_to / sigma
    p_sample, p_model = _data_prediction(config.prediction, alpha, sigma)
    one = np.ones_like(alpha)
    # Euler's sample is x/α: c_sample and c_model change unit, from this level's to the next one's.
    scale, scale_to = (alpha, alpha_to) if config.solver == "euler" else (one, one)
    rows = []
    for k in (_extrapolation(config, alpha / sigma, alpha_to, sigma_to), 0 * one):
        row = np.zeros((len(alpha), 8))
        row[:, 0] = (kept + weight * (1 + k) * p_sample) * scale / scale_to
        row[:, 1] = weight * (1 + k) * p_model / scale_to
        row[:, 2] = -weight * k
        if config.solver == "dpm":
            row[:, 4], row[:, 5] = p_sample, p_model
        row[:, 6] = np.append(scale[1:], 1.0)
        rows.append(row.astype(np.float32))
    noising = np.stack([alpha / scale, sigma / scale], axis=1).astype(np.float32)
    initial = 1 / scale[0] if config.spacing == "leading" else np.max(sigma / scale)
    initial_scale = float(initial) if config.solver == "euler" else 1.0
    narrow = timesteps.astype(np.float32), *rows, scale.astype(np.float32), noising
    return SolverTables(*narrow, initial_scale)


def _data_prediction(prediction: str, alpha: Float64, sigma: Float64) -> tuple[Float64, Float64]:
    """p, q of x0 = p x + q g, from x = α x0 + σ ε and v = α ε - σ x0; all [S]."""
    if prediction == "sample":
        return np.zeros_like(alpha), np.ones_like(alpha)
    if prediction == "v_prediction":
        return alpha, -sigma
    wanted = "v_prediction or sample, as the first step is pure noise (rescale_zero_snr)"
    advice = "Use spacing 'leading' if the model does predict epsilon."
    _require(bool(np.all(alpha > 0)), "prediction", wanted, prediction, advice)
    return 1 / alpha, -sigma / alpha


def _extrapolation(
    config: SolverConfig, snr: Float64, alpha_to: Float64, sigma_to: Float64
) -> Float64:
    """k of each step [S], 0 where it is of first order; ``snr`` = α/σ."""
    k, first_order_end = np.zeros_like(snr), config.lower_order_final and config.steps < 15
    if config.solver == "dpm":
        first_order_end |= config.euler_at_final or config.final_sigma == "zero"
        end = config.steps - int(first_order_end)
        h = np.log(alpha_to[:end] / sigma_to[:end] / snr[:end])
        wanted = "noise levels that fall at every step but the last"
        advice = "Use fewer steps, steps_offset 0 or another spacing."
        _require(bool(np.all(h[:-1] > 0)), "steps", wanted, config.steps, advice)
        k[1:end] = h[1:] / h[:-1] / 2
    return k


def _timesteps(config: SolverConfig) -> Float64:
    """The spaced timesteps, falling, float64 [S]; DPM leaves out the last of S + 1."""
    T, S = config.noise.train_timesteps, config.steps
    points = S + 1 if config.solver == "dpm" else S
    if config.spacing == "leading":
        return np.arange(points)[::-1][:S] * float(T // points) + config.steps_offset
    if config.spacing == "linspace":
        spaced = np.linspace(0, T - 1, points)[::-1][:S]
        return spaced.astype(np.float32) if config.solver == "euler" else np.round(spaced)
    spaced = np.round(np.arange(T, 0, -T / S)) - 1
    wanted = "a number of steps that 'trailing' divides T into"
    _require(len(spaced) == S, "steps", wanted, S, "Take one step more or fewer.")
    return spaced


def _ddim_levels(config: SolverConfig) -> tuple[Float64, ...]:
    """Timesteps, then α, σ of each step and α', σ' that it goes to: T // S timesteps below."""
    levels, timesteps = config.noise.alphas_cumprod(), _timesteps(config)
    index, T = timesteps.astype(np.int64), config.noise.train_timesteps
    wanted, advice = f"timesteps below {T}", "Use steps_offset 0 or fewer steps."
    _require(int(index[0]) < T, "steps_offset", wanted, int(index[0]), advice)
    below = index - T // config.steps
    end = 1.0 if config.set_alpha_to_one else levels[0]
    here, there = levels[index], np.where(below >= 0, levels[np.maximum(below, 0)], end)
    return timesteps, np.sqrt(here), np.sqrt(1 - here), np.sqrt(there), np.sqrt(1 - there)


def _sigma_levels(config: SolverConfig) -> tuple[Float64, ...]:
    """As ``_ddim_levels``, where each step goes to the level of the next one."""
    training, dpm = config.noise.sigmas(), config.solver == "dpm"
    timesteps, times = _timesteps(config), np.arange(len(training))
    ratio = np.interp(timesteps, times, training)  # σ/α
    if config.karras:
        high, low = (training[[-1, 0]] if dpm else ratio[[0, -1]]) ** (1 / 7)
        ratio = (high + np.linspace(0, 1, config.steps) * (low - high)) ** 7
        timesteps = np.interp(np.log(ratio), np.log(training.astype(np.float32)), times)
        if dpm and config.noise.beta_schedule != "squaredcos_cap_v2":
            timesteps = np.round(timesteps)
    timesteps = np.trunc(timesteps) if dpm else timesteps
    ratio = np.append(ratio, 0.0 if config.final_sigma == "zero" else training[0])
    ratio = ratio.astype(np.float32).astype(np.float64)
    alpha = 1 / np.sqrt(1 + ratio**2)
    sigma = ratio * alpha
    return timesteps, alpha[:-1], sigma[:-1], alpha[1:], sigma[1:]


def solver_step_numpy(
    row: Float32,
    guidance_scale: float,
    sample: Float32,
    history: Float32 | None,
    model_output: Float32,
    next_input: Float32 | None,
    scratch: Float32,
) -> None:
    """Run one table row in place: ``sample`` and ``history`` [N, M] become the next step's.

    ``model_output`` is [N, M], or [2N, M] with the unconditional half first; then ``next_input``
    is [2N, M] too and gets both halves. ``scratch`` [N, M] is overwritten. Nothing is allocated.
    """
    if history is None:
        sample *= row[0]
    else:
        np.multiply(history, row[2], out=scratch) if row[2] else scratch.fill(0)
        np.multiply(sample, row[4], out=history)
        sample *= row[0]
        sample += scratch
        history += _guided(model_output, guidance_scale, row[5], scratch)
    sample += _guided(model_output, guidance_scale, row[1], scratch)
    if next_input is not None:
        N = len(sample)
        np.multiply(sample, row[6], out=next_input[:N])
        next_input[N:] = next_input[: len(next_input) - N]


def _guided(model_output: Float32, scale: float, factor: np.float32, out: Float32) -> Float32:
    """factor · (u + scale · (c - u)) of the halves u, c (Ho and Salimans 2022), into ``out``."""
    N = len(out)
    if len(model_output) == N:
        return np.multiply(model_output, factor, out=out)
    np.subtract(model_output[N:], model_output[:N], out=out)
    out *= scale
    out += model_output[:N]
    out *= factor
    return out
