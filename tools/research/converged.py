"""How far do presets end from the converged run, and what do they cost?

    python -m blockcache.tools.research.converged BUNDLE [--preset NAME] [--guidance 5]
        [--images 64] [--work FOLDER] [--json FILE]

The yardstick is the converged run: the same noise, prompt and guidance on 100 levels, where more
change nothing. Every preset of the bundle, which is of the demo model, draws the same images, from
noise and captions that calibrated nothing. One row a preset says

- its FLOPs, in uncached steps,
- its mean distance (relative L2 of the final latents, with the standard error) to the converged
  run, and to the uncached run of the same steps and grid,
- on how many images it is nearer than the best uncached preset that costs at most a tenth more.

What was drawn is kept in ``--work``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from blockcache.export import Calibration, SourceModel
from blockcache.export.measure.sampling import Job, Sampling, job_seed
from blockcache.runtime import Bundle, ConfigError, Preset, Session, SolverConfig
from blockcache.runtime.bundles.tensor_files import preset_bytes
from blockcache.runtime.engines.ort import OrtBackend
from blockcache.runtime.files import write_bytes, write_text
from blockcache.runtime.plan import LOOP_ROLES
from blockcache.runtime.run_table import flops_run
from blockcache.tools.demo.concepts import caption
from blockcache.tools.demo.prompts import STYLES
from blockcache.tools.evaluation.quality import relative_distance
from blockcache.tools.report.errors import one_line_errors
from blockcache.tools.report.progress import StageProgress
from blockcache.tools.report.tables import markdown_table
from blockcache.tools.sources.codecs import DemoCodec
from blockcache.tools.sources.converged import converged_preset
from blockcache.tools.sources.models import DEMO, load_source
from blockcache.tools.sources.references import uncached

CONCEPTS = (
    *("cat face", "pizza", "ghost", "snowman", "robot", "rainbow", "teddy bear", "sunflower"),
    *("tomato", "green apple", "turtle", "taxi", "owl", "doughnut", "frog", "cactus"),
)
"""None is among the prompts that compile calibrates with."""
SEED = 4_242_000  # of the noise; no calibration takes it
BATCH = 8  # images at once
AS_COSTLY = 1.1
"""An uncached preset competes where it costs at most this many times what the other does."""


@dataclass(frozen=True)
class Row:
    """One preset. Distances are float64 [N]."""

    name: str
    steps: int
    cost: float  # FLOPs of the loop, in uncached steps
    cached: bool
    to_converged: np.ndarray
    to_uncached: np.ndarray | None  # of the same steps and grid; None: it is that run


def main(
    bundle: Annotated[str, typer.Argument(help="A bundle of the demo model.")],
    preset: Annotated[
        list[str] | None, typer.Option(help="Presets to draw; repeatable. Default all.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Another guidance scale than the presets were made for.")
    ] = None,
    images: Annotated[int, typer.Option(min=2)] = 64,
    work: Annotated[Path, typer.Option(help="Keeps what was drawn.")] = Path("converged-work"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Every number.")] = None,
) -> None:
    """Draw, compare, print the table."""
    opened = Bundle.open(bundle)
    model = load_source(DEMO)
    if opened.model.sha256 != model.sha256:
        raise ConfigError(f"Expected a bundle of the demo model at {bundle}.")
    names = preset or list(opened.presets)
    presets = [_guided(opened.preset(name), guidance) for name in names]
    draw = Draws(opened, judging_prompts(), images, work)
    with StageProgress() as progress:
        converged = converged_latents(draw, model, presets)
        sampling = _sampling(draw, model, presets)
        rows = []
        for done, each in enumerate(presets):
            progress("presets", done, len(presets))
            rows.append(_row(opened, each, draw, sampling, converged))
    print(table(rows))
    if json_file is not None:
        write_text(json_file, json.dumps([plain(row) for row in rows], indent=1))


def judging_prompts() -> Calibration:
    """What the images are of; nothing calibrates on them."""
    captions = [caption(style, words) for words in CONCEPTS for style in STYLES]
    return Calibration(*DemoCodec().encode(captions))


def _guided(preset: Preset, guidance: float | None) -> Preset:
    """A preset with another guidance scale than its own, where one is given."""
    if guidance is None:
        return preset
    return dataclasses.replace(preset, guidance_scale=guidance)


def _sampling(draw: Draws, model: SourceModel, presets: Sequence[Preset]) -> Sampling:
    """As the presets have it, which are of one guidance scale."""
    guidance = {preset.guidance_scale for preset in presets}
    if len(guidance) != 1:
        raise ConfigError(f"Expected presets of one guidance scale, got {sorted(guidance)}.")
    solver = SolverConfig.from_json(presets[0].solver)
    return Sampling(model, solver, draw.prompts, presets[0].guidance_scale)


def converged_latents(draw: Draws, model: SourceModel, presets: Sequence[Preset]) -> np.ndarray:
    """The yardstick of the presets: latents float32 [N, C, H, W] of the converged run."""
    fine = converged_preset(draw.bundle, presets[0])
    sampling = _sampling(draw, model, presets)
    return draw.once(fine.name, digest(fine), lambda: draw.preset(fine, sampling))


class Draws:
    """Latents of the same images, drawn once each way."""

    def __init__(self, bundle: Bundle, prompts: Calibration, images: int, work: Path) -> None:
        self.bundle, self.prompts = bundle, prompts
        self._jobs = [(image % prompts.prompts, SEED + image) for image in range(images)]
        self._work = work

    def once(self, what: str, key: object, draw: Callable[[], np.ndarray]) -> np.ndarray:
        """Latents float32 [N, C, H, W], from the work folder or drawn now."""
        facts = [self.bundle.model.sha256, self.prompts.sha256, self._jobs, key]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        file = self._work / f"{what}-{digest[:16]}.npy"
        if not file.is_file():
            latents = draw()
            self._work.mkdir(parents=True, exist_ok=True)
            write_bytes(file, _npy(latents))
        return np.asarray(np.load(file, allow_pickle=False))

    def preset(self, preset: Preset, sampling: Sampling) -> np.ndarray:
        """By the runtime, from the same noise."""
        positive, negative = self.prompts.positive, self.prompts.negative
        drawn = []
        with Session(self.bundle, preset, OrtBackend()) as session:
            for jobs in self.batches():
                prompts = positive["encoder_hidden_states"][[prompt for prompt, _ in jobs]]
                noise = sampling.noise(jobs).numpy()
                seeds = [job_seed(job) for job in jobs]
                empty = negative["encoder_hidden_states"]
                done = session.denoise(noise, prompts, empty, seeds=seeds)
                drawn.append(done.latents)
        return np.concatenate(drawn)

    def batches(self) -> list[list[Job]]:
        """All jobs, so many at once."""
        return [self._jobs[begin : begin + BATCH] for begin in range(0, len(self._jobs), BATCH)]


def _row(bundle: Bundle, preset: Preset, draw: Draws, sampling: Sampling, far: np.ndarray) -> Row:
    """What one preset draws, and how far that is."""
    plain = uncached(preset)
    once = sum(segment.flops for segment in bundle.segments if segment.role in LOOP_ROLES)
    latents = draw.once(preset.name, digest(preset), lambda: draw.preset(preset, sampling))
    cached = preset.schedule != plain.schedule
    reference = None
    if cached:
        name = f"{preset.name}-uncached"
        reference = draw.once(name, digest(plain), lambda: draw.preset(plain, sampling))
    return Row(
        name=preset.name,
        steps=preset.schedule.steps,
        cost=float(flops_run(bundle.segments, preset.schedule).sum()) / once,
        cached=cached,
        to_converged=relative_distance(latents, far),
        to_uncached=None if reference is None else relative_distance(latents, reference),
    )


def digest(preset: Preset) -> str:
    """Of everything that decides what a preset draws."""
    told = json.dumps([preset.solver, preset.guidance_scale]).encode()
    return hashlib.sha256(preset_bytes(preset) + told).hexdigest()


def table(rows: Sequence[Row]) -> str:
    """The rows, the cheapest last."""
    lines = []
    for row in sorted(rows, key=lambda row: -row.cost):
        rivals = [other for other in rows if _competes(other, row)]
        rival = min(rivals, key=lambda other: other.to_converged.mean(), default=None)
        ahead = "" if rival is None else (row.to_converged < rival.to_converged).sum()
        lines.append(
            [
                f"`{row.name}`",
                f"{row.cost:.2f}",
                _mean(row.to_converged),
                "" if row.to_uncached is None else _mean(row.to_uncached),
                "" if rival is None else f"{ahead} of {len(row.to_converged)}: `{rival.name}`",
            ]
        )
    header = ["preset", "FLOPs in steps", "to the converged run", "to its own uncached run"]
    return markdown_table([*header, "nearer than as costly uncached steps"], lines)


def _competes(other: Row, row: Row) -> bool:
    return row.cached and not other.cached and other.cost <= AS_COSTLY * row.cost


def _mean(values: np.ndarray) -> str:
    return f"{values.mean():.4f} ± {values.std(ddof=1) / np.sqrt(len(values)):.4f}"


def plain(row: Row) -> dict[str, object]:
    """A row for JSON."""
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in dataclasses.asdict(row).items()
    }


def _npy(latents: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, latents, allow_pickle=False)
    return buffer.getvalue()


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
