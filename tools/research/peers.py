"""How far do other cachers end from the converged run, on our steps and on the scheduler's?

    pip install --no-deps DeepCache==0.1.1
    python -m blockcache.tools.research.peers BUNDLE [--preset dpm-20] [--images 64] [--json FILE]

They run in PyTorch with the demo model, on the steps and by the solver of each uncached preset that
is named, from the noise and captions of ``converged.py``, whose work folder they share.

- ``deepcache``: the package of that name, branch 0, every so many steps (Ma et al., CVPR 2024).
- ``taylorseer``: the same branch, forecast by finite differences of order 1 or 2 (Liu et al., ICCV
  2025), every so many steps.
- ``spectrum``: our own reading of arXiv 2603.01623. After five steps, steps are left out, in spans
  that grow. There the output of the last up block is forecast: half by Chebyshev polynomials of
  degree 4 over all computed steps (ridge 0.1), half by a line through the last two.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Protocol, TypeAlias

import numpy as np
import torch
import typer
from torch.utils.flop_counter import FlopCounterMode

from blockcache.export import SourceModel
from blockcache.export.measure.sampling import Job, Sampling, job_seed, steps_of
from blockcache.export.unet.cached_unet import CacheableBranch, guided_output
from blockcache.export.unet.model import UNetCall
from blockcache.runtime import Bundle, ConfigError, MissingExtraError, Preset, SolverConfig
from blockcache.runtime.files import write_text
from blockcache.tools.evaluation.quality import relative_distance
from blockcache.tools.report.errors import one_line_errors
from blockcache.tools.report.progress import StageProgress
from blockcache.tools.research.converged import (
    Draws,
    Row,
    converged_latents,
    digest,
    judging_prompts,
    plain,
    table,
)
from blockcache.tools.sources.models import DEMO, load_source

Evaluate: TypeAlias = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""(step, sample [2N, C, H, W], timestep []) to the model's output [2N, C, H, W]."""


class Peer(Protocol):
    """Another project's way to reuse."""

    @property
    def name(self) -> str:
        """As it stands in the table."""

    def costs_like(self) -> Peer:
        """One that leaves out as much, and really does."""

    def on(
        self, model: SourceModel, call: Evaluate, timesteps: np.ndarray
    ) -> AbstractContextManager[Evaluate]:
        """The model under this cacher for one denoising; restored on exit."""


@dataclass(frozen=True)
class Uncached:
    """Nothing is reused."""

    name = "uncached"

    def costs_like(self) -> Peer:
        """Itself."""
        return self

    @contextmanager
    def on(self, model: SourceModel, call: Evaluate, timesteps: np.ndarray) -> Iterator[Evaluate]:
        """The model as it is."""
        yield call


@dataclass(frozen=True)
class DeepCache:
    """The package's helper, branch 0."""

    interval: int

    @property
    def name(self) -> str:
        """As it stands in the table."""
        return f"deepcache-{self.interval}"

    def costs_like(self) -> Peer:
        """Itself."""
        return self

    @contextmanager
    def on(self, model: SourceModel, call: Evaluate, timesteps: np.ndarray) -> Iterator[Evaluate]:
        """Its helper finds the step by the timestep, among those of a scheduler."""
        try:
            from DeepCache import DeepCacheSDHelper
        except ImportError as error:
            raise MissingExtraError(
                "DeepCache is not installed. Install it: pip install --no-deps DeepCache==0.1.1"
            ) from error
        scheduler = SimpleNamespace(timesteps=timesteps.tolist())
        helper = DeepCacheSDHelper(SimpleNamespace(unet=model.unet, scheduler=scheduler))
        helper.set_params(cache_interval=self.interval, cache_branch_id=0)
        helper.enable()
        try:
            yield call
        finally:
            helper.disable()


@dataclass(frozen=True)
class TaylorSeer:
    """DeepCache's branch, forecast by finite differences over the computed steps."""

    interval: int
    order: int

    @property
    def name(self) -> str:
        """As it stands in the table."""
        return f"taylorseer{self.order}-{self.interval}"

    def costs_like(self) -> Peer:
        """DeepCache, which leaves the branch out where this one only does not use it."""
        return DeepCache(self.interval)

    @contextmanager
    def on(self, model: SourceModel, call: Evaluate, timesteps: np.ndarray) -> Iterator[Evaluate]:
        """A module that forecasts, in the place of the one that the branch's output enters."""
        branch = next(block for block in model.cut_at((0,)).blocks if block.depth == 0)
        parent_path, _, name = branch.path.rpartition(".")
        parent = model.unet.get_submodule(parent_path)
        inner = getattr(parent, name)
        forecast = _TaylorBranch(inner, self.order + 1, branch.channels)

        def evaluate(step: int, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            forecast.recompute = step % self.interval == 0
            forecast.ahead = step % self.interval / self.interval
            return call(step, sample, timestep)

        setattr(parent, name, forecast)
        try:
            yield evaluate
        finally:
            setattr(parent, name, inner)


class _TaylorBranch(CacheableBranch):
    """``sum_i (differences of order i) * ahead^i / i!``, in units of the interval."""

    ahead = 0.0

    def reused(self) -> torch.Tensor:
        """The forecast; of a lower order while fewer outputs are known."""
        total, factor = self.kept[0], 1.0
        differences = list(self.kept)
        for order in range(1, len(self.kept)):
            differences = [a - b for a, b in itertools.pairwise(differences)]
            factor *= self.ahead / order
            total = total + factor * differences[0]
        return total


@dataclass(frozen=True)
class Spectrum:
    """Whole steps are left out, and the last feature of the up path is forecast."""

    growth: float  # of the span between computed steps, with each that is computed
    warm_up: int = 5  # computed first
    span: float = 2.0  # to begin with
    degree: int = 4
    ridge: float = 0.1
    share: float = 0.5  # of the polynomials; the rest is of the line

    @property
    def name(self) -> str:
        """As it stands in the table."""
        return f"spectrum-{self.growth:g}"

    def costs_like(self) -> Peer:
        """Itself."""
        return self

    def computed(self, steps: int) -> list[bool]:
        """Which steps run the U-Net."""
        chosen, span, left_out = [], self.span, 0
        for step in range(steps):
            runs = step < self.warm_up or (left_out + 1) % int(span) == 0
            if runs and step >= self.warm_up:
                span += self.growth
            left_out = 0 if runs else left_out + 1
            chosen.append(runs)
        return chosen

    @contextmanager
    def on(self, model: SourceModel, call: Evaluate, timesteps: np.ndarray) -> Iterator[Evaluate]:
        """What the last up block gives is kept; only what follows it runs at the other steps."""
        unet, runs = model.unet, self.computed(len(timesteps))
        times: list[int] = []
        features: list[torch.Tensor] = []

        def keep(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
            features.append(output)

        def evaluate(step: int, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            if runs[step]:
                times.append(step)
                return call(step, sample, timestep)
            hidden = self.forecast(times, features, step, len(timesteps))
            output: torch.Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))
            return output

        hook = unet.up_blocks[-1].register_forward_hook(keep)
        try:
            yield evaluate
        finally:
            hook.remove()

    def forecast(
        self, times: list[int], features: list[torch.Tensor], step: int, steps: int
    ) -> torch.Tensor:
        """A feature of the shape of ``features`` at ``step``, from those at ``times``."""
        at = 2 * np.array([*times, step]) / (steps - 1) - 1
        basis = np.polynomial.chebyshev.chebvander(at, self.degree)
        known, wanted = basis[:-1], basis[-1]
        normal = known.T @ known + self.ridge * np.eye(self.degree + 1)
        weights = self.share * (wanted @ np.linalg.solve(normal, known.T))
        ahead = (step - times[-1]) / (times[-1] - times[-2])
        weights[-1] += (1 - self.share) * (1 + ahead)
        weights[-2] -= (1 - self.share) * ahead
        return sum(  # type: ignore[return-value]
            float(weight) * feature for weight, feature in zip(weights, features, strict=True)
        )


PEERS: tuple[Peer, ...] = (
    *(DeepCache(interval) for interval in (2, 3, 5)),
    *(TaylorSeer(interval, order) for interval in (2, 3, 5) for order in (1, 2)),
    *(Spectrum(growth) for growth in (0.25, 0.75, 3.0)),
)


def main(
    bundle: Annotated[str, typer.Argument(help="A bundle of the demo model.")],
    preset: Annotated[
        list[str], typer.Option(help="Uncached: whose steps and solver they run on; repeatable.")
    ],
    images: Annotated[int, typer.Option(min=2)] = 64,
    work: Annotated[Path, typer.Option(help="Keeps what was drawn.")] = Path("converged-work"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Every number.")] = None,
) -> None:
    """Draw, compare, print the table."""
    opened, model = Bundle.open(bundle), load_source(DEMO)
    presets = [opened.preset(name) for name in preset]
    for each in presets:
        if not each.schedule.recompute.all():
            raise ConfigError(f"Expected uncached presets, {each.name!r} reuses.")
    draws = Draws(opened, judging_prompts(), images, work)
    pairs = [(chosen, peer) for chosen in presets for peer in PEERS]
    rows = []
    with StageProgress() as progress:
        far = converged_latents(draws, model, presets)
        for done, (chosen, peer) in enumerate(pairs):
            progress("cachers", done, len(pairs))
            rows.append(_row(draws, model, chosen, peer, far))
    print(table(rows))
    if json_file is not None:
        write_text(json_file, json.dumps([plain(row) for row in rows], indent=1))


def _row(draws: Draws, model: SourceModel, chosen: Preset, peer: Peer, far: np.ndarray) -> Row:
    """What a cacher draws on a preset's steps, and how far that is."""
    solver = SolverConfig.from_json(chosen.solver)
    sampling = Sampling(model, solver, draws.prompts, chosen.guidance_scale)
    name, facts = f"{peer.name} on {chosen.name}", [repr(peer), digest(chosen)]

    def drawn() -> np.ndarray:
        return np.concatenate([draw(sampling, peer, jobs) for jobs in draws.batches()])

    latents = draws.once(name.replace(" ", "-"), facts, drawn)
    uncached = draws.once(chosen.name, digest(chosen), lambda: draws.preset(chosen, sampling))
    return Row(
        name=name,
        steps=solver.steps,
        cost=cost_in_steps(sampling, peer.costs_like()),
        cached=True,
        to_converged=relative_distance(latents, far),
        to_uncached=relative_distance(latents, uncached),
    )


@torch.no_grad()
def draw(sampling: Sampling, peer: Peer, jobs: Sequence[Job]) -> np.ndarray:
    """Latents float32 [N, C, H, W] of jobs, with guidance, under a cacher."""
    model, solver = sampling.model, steps_of(sampling.solver, [job_seed(job) for job in jobs])
    picked = sampling.calibration.pick([prompt for prompt, _ in jobs], guided=True)
    conditions = [picked[condition.name] for condition in model.conditions]
    unet = UNetCall(model.unet, model.conditions)

    def call(_step: int, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = unet(sample, timestep, *conditions)
        return output

    latents, past = solver.start(sampling.noise(jobs), None, 0), tuple[torch.Tensor, ...]()
    with peer.on(model, call, solver.timesteps) as evaluate:
        for step, timestep in enumerate(solver.timesteps):
            sample = solver.model_input(latents, past, step)
            output = evaluate(step, torch.cat([sample, sample]), torch.tensor(float(timestep)))
            guided = guided_output(output, sampling.guidance_scale, 0.0)
            latents, past = solver.advance(latents, past, guided, step)
    return latents.numpy()


def cost_in_steps(sampling: Sampling, peer: Peer) -> float:
    """FLOPs of one image under a cacher, in uncached steps."""

    def flops(cacher: Peer) -> int:
        with FlopCounterMode(display=False) as counter:
            draw(sampling, cacher, [(0, 0)])
        return counter.get_total_flops()

    return flops(peer) * sampling.steps / flops(Uncached())


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
