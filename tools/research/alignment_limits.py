"""How much of a reuse's error could an alignment repair, whatever it may fit?

    python -m blockcache.tools.research.alignment_limits BUNDLE --preset dpm-20-t1.43

Runs the uncached loop of the demo model, keeps every block's outputs, fits later outputs by earlier
ones in many ways on half of the images, and prints the error on the other half, as a share of the
error without alignment. Outputs are those of the uncached run, which makes every way look better
than it is in use. Then it denoises by the preset's schedule with alignments fitted on few and on
many images, and prints the distance to the uncached run: would more data help?
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeAlias

import numpy as np
import typer

from blockcache.export import AlignmentOptions, SourceModel
from blockcache.export.align.fit import fit_alignment
from blockcache.export.measure.sampling import Sampling
from blockcache.runtime import Alignment, Bundle, ConfigError, Schedule, SolverConfig
from blockcache.tools.evaluation.quality import relative_distance
from blockcache.tools.report.errors import one_line_errors
from blockcache.tools.report.tables import markdown_table
from blockcache.tools.sources.block_outputs import block_outputs
from blockcache.tools.sources.models import DEMO, load_source
from blockcache.tools.sources.prompts import calibration_for

Outputs: TypeAlias = np.ndarray
"""A block's outputs at all steps: float32 [S, branch, image, channel, position]."""

PERIODS = (2, 3, 4)
"""A block is computed every P steps; the reuse looked at is the last before the next."""
AMOUNTS = (12, 48, 192)
"""Calibration images to fit on."""
SEED = 700_001  # of the noise; no calibration takes it
RIDGE = 1e-3


def main(
    bundle: Annotated[str, typer.Argument(help="A bundle of the demo model.")],
    preset: Annotated[str, typer.Option(help="Solver, guidance and schedule.")] = "dpm-20-t1.43",
    images: Annotated[int, typer.Option(min=2, help="Half to fit on, half to judge by.")] = 32,
) -> None:
    """Print both tables."""
    opened = Bundle.open(bundle)
    chosen = opened.preset(preset)
    model, calibration = load_source(DEMO), calibration_for(DEMO, None, None)
    if opened.model.sha256 != model.sha256:
        raise ConfigError(f"Expected a bundle of the demo model at {bundle}.")
    if chosen.guidance_scale == 1 or chosen.schedule.steps < 3 * max(PERIODS):
        raise ConfigError(
            f"Expected a preset with guidance and {3 * max(PERIODS)} steps or more, got "
            f"{chosen.guidance_scale:g} and {chosen.schedule.steps} of {preset}."
        )
    solver = SolverConfig.from_json(chosen.solver)
    sampling = Sampling(model, solver, calibration, chosen.guidance_scale)
    outputs = all_outputs(sampling, images)
    projections = [_projection(model, block.path) for block in model.blocks]
    columns = [f"every {period} steps" for period in PERIODS]
    made = [
        [errors(block, period, weight) for block, weight in zip(outputs, projections, strict=True)]
        for period in PERIODS
    ]
    rows = [
        [kind, *(f"{np.mean([block[kind] for block in blocks]):.2f}" for blocks in made)]
        for kind in made[0][0]
    ]
    print(markdown_table(["error left, held-out images", *columns], rows))
    print()
    print(markdown_table(
        ["distance to uncached", "unaligned", *(f"{amount} images" for amount in AMOUNTS)],
        distances(sampling, chosen.schedule, images),
    ))  # fmt: skip


def all_outputs(sampling: Sampling, images: int) -> list[Outputs]:
    """What every block computes, in an uncached run with guidance."""
    jobs = [(i % sampling.calibration.prompts, SEED + i) for i in range(images)]
    blocks = range(len(sampling.model.blocks))
    found = block_outputs(sampling, jobs, blocks)
    return [found[k].reshape(len(found[k]), 2, images, found[k].shape[2], -1) for k in blocks]


def _projection(model: SourceModel, path: str) -> np.ndarray:
    """The weight [C, C] of a transformer's last layer, which makes C of its features."""
    weight = model.unet.get_submodule(path).proj_out.weight.detach()
    return np.asarray(weight.flatten(1).double().numpy())


def errors(outputs: Outputs, period: int, projection: np.ndarray) -> dict[str, float]:
    """Error left by every kind of fit, as a share of plain reuse's, over all steps.

    Only steps with three computed outputs behind them at the longest period count, so that all
    kinds and periods face the same.
    """
    squares: dict[str, float] = {}
    for step in range(3 * max(PERIODS) - 1, len(outputs)):
        target = outputs[step]
        past = [outputs[step - period + 1 - back * period] for back in range(3)]
        for kind, left in _kinds(target, past, projection).items():
            squares[kind] = squares.get(kind, 0.0) + left
    plain = squares["as it is"]
    return {kind: float(np.sqrt(left / plain)) for kind, left in squares.items()}


def _kinds(
    target: np.ndarray, past: Sequence[np.ndarray], projection: np.ndarray
) -> dict[str, float]:
    """Squared error on the images that were not fitted on: arrays [branch, image, C, P]."""
    half = target.shape[1] // 2
    seen, unseen = slice(None, half), slice(half, None)

    # Of outputs that are nearly the same the differences are what predicts.
    ways = [past[0], past[0] - past[1], past[1] - past[2]]

    def fitted(outputs: int, branches: slice = slice(None)) -> float:
        there = [way[branches] for way in ways[:outputs]]
        return affine(
            target[branches, seen], [x[:, seen] for x in there],
            target[branches, unseen], [x[:, unseen] for x in there],
        )  # fmt: skip

    def by_branch(outputs: int) -> float:
        return sum(fitted(outputs, slice(branch, branch + 1)) for branch in (0, 1))

    def own() -> float:
        """Each image fitted on half of its positions, judged by the others, and vice versa."""
        whole = [(target[:, [i]], past[0][:, [i]]) for i in range(half, target.shape[1])]
        return sum(
            affine(
                y[..., ours::2], [x[..., ours::2]], y[..., 1 - ours :: 2], [x[..., 1 - ours :: 2]]
            )
            for y, x in whole
            for ours in (0, 1)
        )

    last = past[0]
    return {
        "as it is": _square(target[:, unseen] - last[:, unseen]),
        "scale and shift by channel (the paper)": fitted(1),
        "scale and shift by channel and guidance branch": by_branch(1),
        "scale and shift by channel, every image its own": own(),
        "scale and shift by channel, before the projection": before_projection(
            projection, target[:, seen], last[:, seen], target[:, unseen], last[:, unseen]
        ),
        "a matrix over all channels and a shift": matrix(
            target[:, seen], last[:, seen], target[:, unseen], last[:, unseen]
        ),
        "last two outputs by channel (history)": fitted(2),
        "last two by channel and guidance branch": by_branch(2),
        "last three outputs by channel": fitted(3),
    }


def affine(
    target: np.ndarray,
    predictors: Sequence[np.ndarray],
    unseen_target: np.ndarray,
    unseen_predictors: Sequence[np.ndarray],
) -> float:
    """Squared error on unseen arrays [branch, image, C, P] of ridge fits by channel."""
    x, y = _by_channel(predictors), _by_channel([target])[:, 0]  # [C, Q, N], [C, N]
    x_mean, y_mean = x.mean(axis=2), y.mean(axis=1)
    centred = x - x_mean[:, :, None]
    covariance = centred @ centred.transpose(0, 2, 1)
    toward = np.zeros(x.shape[:2])
    toward[:, 0] = 1.0  # plain reuse
    shared = np.einsum("cqn,cn->cq", centred, y - y_mean[:, None])
    size = np.einsum("cqq->cq", covariance)[:, :, None] * np.eye(x.shape[1]) * RIDGE
    size = size + 1e-12 * np.eye(x.shape[1])
    right = shared + np.einsum("cqr,cr->cq", size, toward)
    weights = np.linalg.solve(covariance + size, right[..., None])[..., 0]
    shift = y_mean - np.einsum("cq,cq->c", weights, x_mean)
    x, y = _by_channel(unseen_predictors), _by_channel([unseen_target])[:, 0]
    return _square(y - np.einsum("cq,cqn->cn", weights, x) - shift[:, None])


def before_projection(
    projection: np.ndarray,
    target: np.ndarray,
    last: np.ndarray,
    unseen_target: np.ndarray,
    unseen_last: np.ndarray,
) -> float:
    """The same, where what is scaled and shifted is the input h of the last layer, x = W h + bias.

    The scales that leave the least error of x are one least-squares problem: its normal matrix is
    the product, element by element, of W's and h's.
    """
    x, y = _by_channel([last])[:, 0], _by_channel([target])[:, 0]  # [C, N]
    features = np.linalg.solve(projection, x)  # h, but for a constant, which a shift takes up
    mean, y_mean = features.mean(axis=1, keepdims=True), y.mean(axis=1, keepdims=True)
    centred = features - mean
    left = y - y_mean - projection @ centred
    normal = (projection.T @ projection) * (centred @ centred.T)
    right = np.einsum("ci,cn,in->i", projection, left, centred, optimize=True)
    ridge = np.diag(RIDGE * np.diag(normal))
    scale = 1 + np.linalg.solve(normal + ridge, right)
    x, y = _by_channel([unseen_last])[:, 0], _by_channel([unseen_target])[:, 0]
    estimate = projection @ (scale[:, None] * (np.linalg.solve(projection, x) - mean))
    return _square(y - y_mean - estimate)


def matrix(
    target: np.ndarray, last: np.ndarray, unseen_target: np.ndarray, unseen_last: np.ndarray
) -> float:
    """The same, where every channel may draw on all channels of the last output.

    With few images its error shows too little data, not what a matrix could do.
    """
    x, y = _by_channel([last])[:, 0], _by_channel([target])[:, 0]  # [C, N]
    x_mean, y_mean = x.mean(axis=1, keepdims=True), y.mean(axis=1, keepdims=True)
    centred, left = x - x_mean, y - y_mean - (x - x_mean)
    covariance = centred @ centred.T
    ridge = RIDGE * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    weights = np.eye(len(x)) + np.linalg.solve(covariance + ridge, centred @ left.T).T
    x, y = _by_channel([unseen_last])[:, 0], _by_channel([unseen_target])[:, 0]
    return _square(y - y_mean - weights @ (x - x_mean))


def _by_channel(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays [branch, image, C, P] to float64 [C, Q, N]."""
    stacked = np.stack(arrays).astype(np.float64)  # [Q, branch, image, C, P]
    return stacked.transpose(3, 0, 1, 2, 4).reshape(stacked.shape[3], len(arrays), -1)


def _square(error: np.ndarray) -> float:
    return float(np.square(error, dtype=np.float64).sum())


def distances(sampling: Sampling, schedule: Schedule, images: int) -> list[list[str]]:
    """Rows of the second table: distances to the uncached run on images of other noise."""
    prompts = sampling.spread_prompts(images)
    jobs = [(prompt, SEED + image) for image, prompt in enumerate(prompts)]

    def ends(schedule: Schedule, alignment: Alignment | None = None) -> np.ndarray:
        with sampling.cached_unet(1 if alignment is None else alignment.outputs) as cached:
            denoiser, noise = sampling.begin(cached, jobs)
            return denoiser.denoise(noise, schedule, alignment).cpu().numpy()

    reference = ends(sampling.uncached)
    plain = relative_distance(ends(schedule), reference).mean()
    rows = []
    for name, outputs in (("scale-shift", 1), ("history", 2)):
        cells = [name, f"{plain:.4f}"]
        for amount in AMOUNTS:
            fit = fit_alignment(sampling, schedule, outputs, AlignmentOptions(images=amount))
            cells.append(
                f"{relative_distance(ends(schedule, fit.alignment), reference).mean():.4f}"
            )
        rows.append(cells)
    return rows


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
