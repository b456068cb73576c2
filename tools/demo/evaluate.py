"""The quality of the demo model beside a baseline and the floor, all in one run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from blockcache.runtime.files import replacing, write_text
from blockcache.tools.demo import contender, contexts, data
from blockcache.tools.demo.contender import Contender
from blockcache.tools.demo.data import Dataset
from blockcache.tools.demo.progress import bar
from blockcache.tools.demo.sample import SampleOptions, initial_noise, sample
from blockcache.tools.evaluation import features, metrics
from blockcache.tools.evaluation.metrics import CaptionProbe, CaptionScore, Labelled, Statistics

KID_UNIT = 1000  # KID is reported in thousandths
PART = 128  # pictures drawn and stored at a time


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
    """What `evaluate` found."""

    options: SampleOptions
    reference_pictures: int
    reference_digest: str
    scores: list[Score]


class Evaluation:
    """The reference, its features and the captions every contender draws."""

    def __init__(self, work: Path, options: SampleOptions, count: int, workers: int = 2) -> None:
        self.work = work
        self.options = options
        self.workers = workers
        self.dataset: Dataset = data.load(work)
        random = np.random.default_rng(options.seed)
        self.order = random.permutation(len(self.dataset.images))
        self.chosen = np.resize(self.order, count)  # captions again, with other noise, if need be
        self.contexts = contexts.load(work)
        real = self._features(self.dataset.images, "reference features")
        self.real = self._labelled(real, np.arange(len(real)))
        self.reference = Statistics.of(real)
        self.probe = CaptionProbe(self.real)

    def floor(self) -> Score:
        """Real against real: one random half of the reference against the other."""
        half = len(self.order) // 2
        first, second = (self.real.features[i] for i in (self.order[:half], self.order[half:]))
        return Score(
            name="real pictures (half against half)",
            pictures=half,
            frechet=metrics.frechet_distance(Statistics.of(first), Statistics.of(second)),
            kid=KID_UNIT * metrics.kernel_distance(first, second),
            caption=self.probe.score(self.real),
        )

    def bottleneck(self, subject: Contender) -> Score:
        """Real pictures through the subject's autoencoder: the best it could draw."""
        images = subject.reconstruct(self.dataset.images)
        return self._score("real pictures through the autoencoder", images, np.arange(len(images)))

    def score(self, subject: Contender) -> Score:
        """Draw the chosen captions and compare with the reference."""
        score = self._score(subject.name, self._draw(subject), self.chosen)
        return replace(score, parameters=subject.parameters())

    def _score(self, name: str, images: np.ndarray, index: np.ndarray) -> Score:
        """Compare pictures of the captions at `index` with the reference."""
        drawn = self._features(images, f"{name}: features")
        return Score(
            name=name,
            pictures=len(images),
            frechet=metrics.frechet_distance(Statistics.of(drawn), self.reference),
            kid=KID_UNIT * metrics.kernel_distance(drawn, self.real.features),
            caption=self.probe.score(self._labelled(drawn, index)),
        )

    def _labelled(self, found: np.ndarray, index: np.ndarray) -> Labelled:
        pictures = [self.dataset.pictures[i] for i in index]
        return Labelled(
            features=found,
            styles=np.array([p.style for p in pictures]),
            concepts=np.array([p.words for p in pictures]),
        )

    def _features(self, images: np.ndarray, title: str) -> np.ndarray:
        with _counting(title, len(images)) as done:
            return features.cached(images, self.work / "features", features.Extractor, done)

    def _draw(self, subject: Contender) -> np.ndarray:
        """Pictures uint8 [N, 3, H, W]; every part is drawn once per weights and options."""
        folder = self.work / "drawn" / _key(subject, self.options)
        starts = range(0, len(self.chosen), PART)
        with (
            _counting(f"{subject.name}: sampling", len(starts)) as done,
            ThreadPoolExecutor(
                self.workers, initializer=torch.set_num_threads, initargs=(1,)
            ) as pool,
        ):
            parts = []
            for part in pool.map(lambda start: self._part(subject, folder, start), starts):
                parts.append(part)
                done(len(parts))
        return np.concatenate(parts)

    def _part(self, subject: Contender, folder: Path, start: int) -> np.ndarray:
        """The pictures from `start` on, at most PART of them."""
        index = self.chosen[start : start + PART]
        path = folder / f"{start:05d}-{len(index):03d}.npy"
        if path.exists():
            return np.load(path, allow_pickle=False)
        size = subject.unet.config["sample_size"]
        noise = initial_noise(len(index), size, self.options.seed + start)
        latents = sample(
            subject.unet,
            subject.scheduler,
            self.contexts[torch.from_numpy(index)],
            self.contexts[-1].float(),
            noise,
            self.options,
        )
        images = subject.decode(latents)
        with replacing(path) as file:
            np.save(file, images, allow_pickle=False)
        return images


def _key(subject: Contender, options: SampleOptions) -> str:
    digest = hashlib.sha256(f"{options} {PART}".encode())
    for parameter in subject.unet.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    probe = initial_noise(1, subject.unet.config["sample_size"], seed=0)
    digest.update(subject.decode(probe).tobytes())  # the decoder is just a function
    return f"{subject.name.replace(' ', '-')}-{digest.hexdigest()[:12]}"


@contextmanager
def _counting(title: str, total: int) -> Iterator[Callable[[int], None]]:
    with bar() as progress:
        task = progress.add_task(title, total=total, note="")
        yield lambda count: progress.update(task, completed=count, note=f"{count}/{total}")


def evaluate(
    work: Path,
    model_dir: Path,
    results: Path,
    baseline: Path | None,
    options: SampleOptions,
    count: int,
) -> Report:
    """Score floor, model and baseline; writes quality.json and quality.md into `results`."""
    evaluation = Evaluation(work, options, count)
    subjects = [contender.load(model_dir, "demo model")]
    if baseline:
        subjects.append(contender.load(baseline, "baseline"))
    scores = [evaluation.floor(), evaluation.bottleneck(subjects[0])]
    for subject in subjects:
        scores.append(evaluation.score(subject))
        report = Report(
            options=options,
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
    lines = [
        "# Quality of the demo model",
        "",
        f"{options.steps} steps of DPM-Solver++ (2M), guidance {options.guidance}, seed "
        f"{options.seed}{precision}; reference: {report.reference_pictures} real pictures of the "
        f"same styles (features `{report.reference_digest}`). Fréchet distance and KID in "
        "EfficientNet-Lite0 features, lower is better. Caption score: the picture is recognised, "
        "among all concepts, from how the *other* styles draw them; higher is better, the first "
        "row is the ceiling. Captions are drawn again from other noise where there are more "
        "pictures than captions.",
        "",
        "| | pictures | Fréchet distance | KID × 1000 | caption top-1 | top-5 | candidates |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_row(score) for score in report.scores]
    return "\n".join(lines) + "\n"


def _row(score: Score) -> str:
    caption = score.caption
    return (
        f"| {score.name} | {score.pictures} | {score.frechet:.1f} | {score.kid:.2f} "
        f"| {caption.top1:.1%} | {caption.top5:.1%} | {caption.candidates} |"
    )
