"""Alignment in closed form: least squares on the student's own trajectory (section 3.4).

``y = x + scale * C_last + shift`` per block, reused step and channel, or with history
``y = x + scale * C_last + before * C_before + shift``. The paper trains these numbers for 15,000
iterations on eight GPUs; here one pass over a few dozen images fits them.

The student, that is the U-Net with caching, denoises all calibration images at once. Where its
schedule reuses a block, the block is run all the same: its output C on the student's own input is
what the aligned sum should have been. The coefficients of that block and step are fitted on the
spot, and the student goes on *with* them. So every fit sees the inputs that the aligned student
will see, as the paper asks of its training targets, and one sweep settles all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from blockcache.export.align.solver_fit import Targets, first_order, fitted_step
from blockcache.export.measure.sampling import Job, Sampling
from blockcache.export.observer import Observer, unobserved
from blockcache.export.unet.cached_unet import State
from blockcache.runtime.errors import ConfigError
from blockcache.runtime.plan import Alignment, Schedule
from blockcache.runtime.solvers.solver import SolverConfig


@dataclass(frozen=True, kw_only=True)
class AlignmentOptions:
    """How coefficients are fitted."""

    images: int = 48  # calibration images, denoised together
    ridge: float = 1e-3  # pull toward plain reuse, relative to a predictor's variance
    seed: int = 7  # of the noise; the profile uses other noise

    def __post_init__(self) -> None:
        if self.images < 1 or not self.ridge > 0:
            raise ConfigError(f"Expected at least one image and a ridge above 0; got {self}.")


@dataclass(frozen=True)
class AlignmentFit:
    """Coefficients, and what they repair on the calibration images."""

    alignment: Alignment
    before: np.ndarray  # float32 [S, K]: |C - C_last| / |C|, 0 where recomputed
    after: np.ndarray  # float32 [S, K]: |C - what is used| / |C|, 0 where recomputed
    latents: np.ndarray  # float32 [N, C, H, W], where the student ended
    fitted: tuple[tuple[float, ...], ...] | None = None  # of the solver's steps, where targets were


def fit_alignment(
    sampling: Sampling,
    schedule: Schedule,
    outputs: int,
    options: AlignmentOptions,
    *,
    jobs: Sequence[Job] | None = None,
    targets: Targets | None = None,
    observer: Observer = unobserved,
) -> AlignmentFit:
    """Fit the coefficients of every reused block and step.

    Args:
        sampling: what to run; image i takes prompt i modulo their number.
        jobs: the images to fit on, in place of those.
        targets: of the first images, where the solver, which is one of ours, is to be fitted.
        schedule: which block is reused when.
        outputs: computed outputs that a reuse combines: 1 (scale-shift) or 2 (history).
        options: how much to fit on.
        observer: hears the steps done, stage "align".
    """
    return _sweep(
        "align", sampling, schedule, outputs, jobs or own_jobs(sampling, options), targets,
        observer, lambda k, step, sums: solve(sums, options.ridge),
    )  # fmt: skip


def judge_alignment(
    sampling: Sampling,
    schedule: Schedule,
    alignment: Alignment,
    options: AlignmentOptions,
    *,
    jobs: Sequence[Job] | None = None,
    targets: Targets | None = None,
    observer: Observer = unobserved,
) -> AlignmentFit:
    """What coefficients made elsewhere repair, on the images that ``fit_alignment`` takes.

    Args:
        sampling: as there.
        schedule: as there.
        alignment: the coefficients to judge.
        options: as there.
        jobs: as there.
        targets: as there.
        observer: hears the steps done, stage "judge".
    """
    return _sweep(
        "judge", sampling, schedule, alignment.outputs, jobs or own_jobs(sampling, options),
        targets, observer, lambda k, step, sums: judge(sums, alignment.tables[k][step]),
    )  # fmt: skip


def _sweep(
    stage: str,
    sampling: Sampling,
    schedule: Schedule,
    outputs: int,
    jobs: Sequence[Job],
    targets: Targets | None,
    observer: Observer,
    choose: Callable[[int, int, np.ndarray], Solved],
) -> AlignmentFit:
    """One run of the student, which goes on with what ``choose`` gives for (k, step, moments)."""
    channels = tuple(block.channels for block in sampling.model.blocks)
    made = [t.copy() for t in Alignment.identity(schedule.steps, channels, outputs).tables]
    before, after = np.zeros((2, *schedule.recompute.shape), np.float32)
    fitted: list[tuple[float, ...]] = []
    if targets is not None:
        assert isinstance(sampling.solver, SolverConfig)
        targets.check(schedule.steps, len(jobs))
        free = first_order(sampling.solver)

    def fit(
        step: int, k: int, computed: torch.Tensor, kept: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        chosen = choose(k, step, moments(computed, kept, outputs))
        made[k][step] = chosen.coefficients
        before[step, k], after[step, k] = chosen.before, chosen.after
        return torch.from_numpy(made[k][step])

    with sampling.cached_unet(outputs) as cached, torch.no_grad():
        denoiser, noise = sampling.begin(cached, jobs)
        state = denoiser.start(noise)
        for step, recompute in enumerate(schedule.recompute):
            output, kept = denoiser.output(state, step, recompute, partial(fit, step))
            if targets is None:
                state = denoiser.advance(state, output, kept, step)
            else:
                latents, past, found = fitted_step(
                    free, state.latents, state.past, output, step, targets.samples[step + 1]
                )
                state = State(latents, past, kept)
                fitted.append(found)
            observer(stage, step + 1, schedule.steps)
    return AlignmentFit(
        Alignment(tuple(made)),
        before,
        after,
        state.latents.cpu().numpy(),
        tuple(fitted) if targets is not None else None,
    )


def own_jobs(sampling: Sampling, options: AlignmentOptions) -> list[Job]:
    """The images that an alignment is fitted on, where nobody names others."""
    return [(i % sampling.calibration.prompts, options.seed + i) for i in range(options.images)]


def moments(computed: torch.Tensor, kept: Sequence[torch.Tensor], outputs: int) -> np.ndarray:
    """Sums of products, per channel, of (1, C_last[, C_last - C_before], C): float64 [C, Q, Q].

    All that a fit needs, and additive over batches: no feature is kept. Without a C_before its
    difference counts as 0.

    Args:
        computed: C, the block's output on the student's input, float [B, C, H, W].
        kept: the outputs that it computed last, the latest first, at least one.
        outputs: 1 or 2, which decides Q = outputs + 2.
    """
    channels = computed.shape[1]
    shape = (channels, outputs + 2, outputs + 2)
    sums = torch.zeros(shape, dtype=torch.float64, device=computed.device)
    for image in range(computed.shape[0]):  # a batch in float64 would be large
        last = kept[0][image].flatten(1)
        rows = [torch.ones_like(last), last]
        if outputs == 2:
            rows.append(last - kept[-1][image].flatten(1))
        rows.append(computed[image].flatten(1))
        stacked = torch.stack(rows, dim=1).double()
        sums += stacked @ stacked.transpose(1, 2)
    return sums.cpu().numpy()


@dataclass(frozen=True)
class Solved:
    """The coefficients of one block and step, and the error without and with them."""

    coefficients: np.ndarray  # float32 [2 or 3, C]: the rows of ``Alignment.tables[k][step]``
    before: float  # |C - C_last| / |C|
    after: float


def solve(sums: np.ndarray, ridge: float) -> Solved:
    """Ridge regression of C - C_last on the centred predictors, per channel.

    The penalty on each coefficient is ``ridge`` times its predictor's variance, and pulls toward
    plain reuse: scale 1, before 0. The shift is free.

    Args:
        sums: as ``moments`` returns them, float64 [C, Q, Q].
        ridge: above 0.
    """
    count, mean = sums[:, 0, 0], sums[:, 0, 1:] / sums[:, 0, :1]
    covariance = sums[:, 1:, 1:] / count[:, None, None] - mean[:, :, None] * mean[:, None, :]
    predictors, target = covariance[:, :-1, :-1], covariance[:, :-1, -1] - covariance[:, :-1, 0]
    variance = np.einsum("cpp->cp", predictors)
    # What varies less than float32 resolves is rounding and gets no weight; nor does what is 0.
    size = np.einsum("cpp->cp", sums)[:, 1:-1] / count[:, None]
    penalty = ridge * variance + 1e-10 * size + np.finfo(np.float64).tiny
    system = predictors + penalty[:, :, None] * np.eye(predictors.shape[1])
    weights = np.linalg.solve(system, target[..., None])[..., 0]
    shift = mean[:, -1] - mean[:, 0] - np.einsum("cp,cp->c", weights, mean[:, :-1])
    # C is estimated as shift + (1 + w_0) C_last + w_1 (C_last - C_before).
    rows = np.stack([1 + weights.sum(axis=1), *(-weights[:, 1:].T), shift])
    return judge(sums, rows.astype(np.float32))


def judge(sums: np.ndarray, coefficients: np.ndarray) -> Solved:
    """The errors of given coefficients: sums as of ``moments``, float32 [2 or 3, C]."""
    scale, *before, shift = coefficients.astype(np.float64)
    estimate = np.stack([shift, scale + sum(before), *(-row for row in before)], axis=1)
    plain = np.zeros_like(estimate)
    plain[:, 1] = 1.0
    return Solved(coefficients, _relative_error(sums, plain), _relative_error(sums, estimate))


def _relative_error(sums: np.ndarray, estimate: np.ndarray) -> float:
    """|C - estimate . predictors| / |C| over all channels, from the sums alone."""
    form = np.concatenate([-estimate, np.ones((len(estimate), 1))], axis=1)
    error = np.einsum("cp,cpq,cq->", form, sums, form)
    return float(np.sqrt(max(error, 0.0) / max(sums[:, -1, -1].sum(), 1e-300)))
