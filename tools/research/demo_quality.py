"""How good are the demo model's pictures, beside another model's and beside real ones?

    python -m blockcache.tools.research.demo_quality [--baseline FOLDER] [--bf16]

Draws the captions of real pictures with the plain PyTorch model and takes Fréchet distance, KID and
caption score to the real pictures. Two rows say how far figures can be trusted: real pictures
against real ones, and real pictures through the autoencoder, the best that the model could draw.
Writes ``quality.md`` and ``quality.json``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel

from blockcache.export import Observer
from blockcache.export.observer import unobserved
from blockcache.runtime.files import replacing, write_text
from blockcache.tools.demo import contexts, data
from blockcache.tools.demo import model as demo_model
from blockcache.tools.demo.autoencoder import TinyAutoencoder, to_signed
from blockcache.tools.evaluation import features
from blockcache.tools.evaluation.captions import CaptionProbe, CaptionScore, Labelled
from blockcache.tools.evaluation.distances import SetDistances
from blockcache.tools.report.errors import one_line_errors
from blockcache.tools.report.progress import StageProgress
from blockcache.tools.report.tables import markdown_table
from blockcache.tools.research.draw import SampleOptions, initial_noise, sample

PART = 128  # pictures drawn and stored at a time
DECODE_BATCH = 64
WORK = Path("~/.cache/blockcache/demo/cpu")


@dataclass(frozen=True, kw_only=True)
class DemoModel:
    """The parts of a demo model; captions and noise are common to all."""

    name: str
    unet: UNet2DConditionModel
    scheduler: DPMSolverMultistepScheduler
    autoencoder: TinyAutoencoder

    @classmethod
    def load(cls, folder: Path, name: str) -> DemoModel:
        """From a folder that ``python -m blockcache.tools.demo export`` wrote."""
        return cls(
            name=name,
            unet=demo_model.load_unet(folder),
            scheduler=demo_model.load_scheduler(folder),
            autoencoder=demo_model.load_autoencoder(folder),
        )

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Latents float32 [N, 4, h, w] to pictures uint8 [N, 3, 4h, 4w]."""
        images = [self.autoencoder.decode(part).numpy() for part in latents.split(DECODE_BATCH)]
        return demo_model.to_uint8(np.concatenate(images))

    @torch.inference_mode()
    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """Pictures uint8 [N, 3, H, W] through the autoencoder and back."""
        parts = np.split(images, range(DECODE_BATCH, len(images), DECODE_BATCH))
        latents = [self.autoencoder.encode(to_signed(part)) for part in parts]
        return self.decode(torch.cat(latents))

    def parameters(self) -> int:
        """Parameters of the U-Net."""
        return sum(p.numel() for p in self.unet.parameters())


@dataclass(frozen=True, kw_only=True)
class Score:
    """One row of the table."""

    name: str
    pictures: int
    frechet: float
    kid: float  # times 1000
    caption: CaptionScore
    parameters: int = 0  # of the U-Net; 0 for real pictures


@dataclass(frozen=True, kw_only=True)
class Report:
    """Every row, and what they were compared with."""

    options: SampleOptions
    reference_pictures: int
    reference_digest: str
    scores: list[Score]


class Evaluation:
    """The real pictures, their features, and the captions that every model draws."""

    def __init__(
        self,
        work: Path,
        options: SampleOptions,
        count: int,
        workers: int = 2,
        observer: Observer = unobserved,
    ) -> None:
        """``work``: where the demo's data lies; ``count``: pictures a model draws."""
        self.work = work
        self.options = options
        self.workers = workers
        self.observer = observer
        self.dataset = data.load(work)
        random = np.random.default_rng(options.seed)
        self.order = random.permutation(len(self.dataset.images))
        self.chosen = np.resize(self.order, count)  # captions again, with other noise, if need be
        self.contexts = contexts.load(work)
        real = self._features(self.dataset.images, "reference features")
        self.real = self._labelled(real, np.arange(len(real)))
        self.reference = SetDistances(real)
        self.probe = CaptionProbe(self.real)

    def floor(self) -> Score:
        """Real against real: one random half of the reference against the other."""
        half = len(self.order) // 2
        first, second = (self.real.features[i] for i in (self.order[:half], self.order[half:]))
        sets = SetDistances(second)
        return Score(
            name="real pictures (half against half)",
            pictures=half,
            frechet=sets.frechet(first).value,
            kid=sets.kernel(first).value,
            caption=self.probe.score(self.real),
        )

    def bottleneck(self, model: DemoModel) -> Score:
        """Real pictures through the model's autoencoder: the best that it could draw."""
        images = model.reconstruct(self.dataset.images)
        return self._score("real pictures through the autoencoder", images, np.arange(len(images)))

    def score(self, model: DemoModel) -> Score:
        """Draw the chosen captions and compare with the reference."""
        score = self._score(model.name, self._draw(model), self.chosen)
        return replace(score, parameters=model.parameters())

    def _score(self, name: str, images: np.ndarray, index: np.ndarray) -> Score:
        """Compare pictures of the captions at ``index`` with the reference."""
        drawn = self._features(images, f"{name}: features")
        return Score(
            name=name,
            pictures=len(images),
            frechet=self.reference.frechet(drawn).value,
            kid=self.reference.kernel(drawn).value,
            caption=self.probe.score(self._labelled(drawn, index)),
        )

    def _labelled(self, found: np.ndarray, index: np.ndarray) -> Labelled:
        pictures = [self.dataset.pictures[i] for i in index]
        return Labelled(
            features=found,
            styles=np.array([p.style for p in pictures]),
            concepts=np.array([p.words for p in pictures]),
        )

    def _features(self, images: np.ndarray, stage: str) -> np.ndarray:
        done = self._counter(stage, len(images))
        return features.cached(images, self.work / "features", features.Extractor, done)

    def _draw(self, model: DemoModel) -> np.ndarray:
        """Pictures uint8 [N, 3, H, W]; every part is drawn once per weights and options."""
        folder = self.work / "drawn" / _key(model, self.options)
        starts = range(0, len(self.chosen), PART)
        done = self._counter(f"{model.name}: sampling", len(starts))
        parts: list[np.ndarray] = []
        with ThreadPoolExecutor(
            self.workers, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            for part in pool.map(lambda start: self._part(model, folder, start), starts):
                parts.append(part)
                done(len(parts))
        return np.concatenate(parts)

    def _part(self, model: DemoModel, folder: Path, start: int) -> np.ndarray:
        """The pictures from ``start`` on, at most PART of them."""
        index = self.chosen[start : start + PART]
        path = folder / f"{start:05d}-{len(index):03d}.npy"
        if path.exists():
            return np.load(path, allow_pickle=False)
        size = model.unet.config["sample_size"]
        noise = initial_noise(len(index), size, self.options.seed + start)
        latents = sample(
            model.unet,
            model.scheduler,
            self.contexts[torch.from_numpy(index)],
            self.contexts[-1].float(),
            noise,
            self.options,
        )
        images = model.decode(latents)
        with replacing(path) as file:
            np.save(file, images, allow_pickle=False)
        return images

    def _counter(self, stage: str, total: int) -> Callable[[int], None]:
        return lambda done: self.observer(stage, done, total)


def _key(model: DemoModel, options: SampleOptions) -> str:
    """Changes with the weights of U-Net and decoder, and with the options."""
    digest = hashlib.sha256(f"{options} {PART}".encode())
    for parameter in model.unet.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    probe = initial_noise(1, model.unet.config["sample_size"], seed=0)
    digest.update(model.decode(probe).tobytes())
    return f"{model.name.replace(' ', '-')}-{digest.hexdigest()[:12]}"


def evaluate(evaluation: Evaluation, models: list[DemoModel], results: Path) -> Report:
    """Score real pictures and every model; writes quality.json and quality.md after each."""
    scores = [evaluation.floor(), evaluation.bottleneck(models[0])]
    for model in models:
        scores.append(evaluation.score(model))
        report = Report(
            options=evaluation.options,
            reference_pictures=len(evaluation.dataset.images),
            reference_digest=features.digest(evaluation.dataset.images),
            scores=list(scores),
        )
        write_text(results / "quality.json", json.dumps(asdict(report), indent=2))
        write_text(results / "quality.md", markdown(report))
    return report


def markdown(report: Report) -> str:
    """The report as a table."""
    options = report.options
    precision = ", bfloat16" if options.bf16 else ""
    text = (
        f"{options.steps} steps of DPM-Solver++ (2M), guidance {options.guidance}, seed "
        f"{options.seed}{precision}; reference: {report.reference_pictures} real pictures of the "
        f"same styles (features `{report.reference_digest}`). Fréchet distance and KID in "
        "EfficientNet-Lite0 features, lower is better. Caption score: the picture is recognised, "
        "among all concepts, from how the *other* styles draw them; higher is better, the first "
        "row is the ceiling. Captions are drawn again from other noise where there are more "
        "pictures than captions."
    )
    columns = ["", "pictures", "Fréchet distance", "KID × 1000", "caption top-1", "top-5"]
    rows = [_row(score) for score in report.scores]
    table = markdown_table([*columns, "candidates"], rows)
    return f"# Quality of the demo model\n\n{text}\n\n{table}\n"


def _row(score: Score) -> list[str]:
    caption = score.caption
    return [
        score.name, f"{score.pictures}", f"{score.frechet:.1f}", f"{score.kid:.2f}",
        f"{caption.top1:.1%}", f"{caption.top5:.1%}", f"{caption.candidates}",
    ]  # fmt: skip


def main(
    work: Annotated[
        Path, typer.Option(help="Where `python -m blockcache.tools.demo data` put the pictures.")
    ] = WORK,
    model: Annotated[
        Path, typer.Option(help="The model folder in diffusers format.")
    ] = demo_model.MODEL_DIR,
    baseline: Annotated[
        Path | None, typer.Option(help="A second model folder, drawn from the same noise.")
    ] = None,
    results: Annotated[Path, typer.Option(help="Where the table goes.")] = demo_model.RESULTS_DIR,
    count: Annotated[int, typer.Option(min=2, help="Pictures drawn per model.")] = 2048,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 is none.")] = 3.0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Draw with bfloat16 autocast.")] = False,
) -> None:
    """Fréchet distance, KID and caption score of the demo model, beside real pictures."""
    options = SampleOptions(steps=steps, guidance=guidance, bf16=bf16)
    models = [DemoModel.load(model, "demo model")]
    if baseline is not None:
        models.append(DemoModel.load(baseline, "baseline"))
    with StageProgress() as progress:
        evaluation = Evaluation(work.expanduser(), options, count, observer=progress)
        report = evaluate(evaluation, models, results)
    typer.echo(markdown(report))


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
