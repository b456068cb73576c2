"""``blockcache evaluate``: quality and speed of a bundle's presets, with a spread."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias, cast

import typer

from blockcache.tools.commands.options import (
    AsJson,
    BackendName,
    BundleFolder,
    ModelName,
    Threads,
)

if TYPE_CHECKING:
    from blockcache.runtime import Bundle
    from blockcache.tools.evaluation.options import DrawOptions, Yardstick
    from blockcache.tools.evaluation.sampling import Workers
    from blockcache.tools.evaluation.subject import Subject


ReferenceWork: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        help="Demo model: the folder of 'python -m blockcache.tools.demo data', whose real "
        "pictures are the reference. Default: pictures of the uncached run from other noise."
    ),
]
Embeddings: TypeAlias = Annotated[
    Path | None,
    typer.Option(help="Encoded prompts instead of a model: latents alone are compared."),
]
Work: TypeAlias = Annotated[
    Path | None, typer.Option(help="What is drawn is kept here. Default OUT/work.")
]
Presets: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--preset", help="Presets to compare; repeatable. Default all."),
]
Reference: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="PRESET",
        help="An uncached preset that all are compared with, fewer steps with caching too. "
        "Default: the uncached run of each preset's own step count.",
    ),
]
YardstickName: TypeAlias = Annotated[
    str,
    typer.Option(
        metavar="converged|uncached",
        help="What distances are taken to: the same noise in 100 steps, or the uncached run.",
    ),
]
RayAddress: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS|local",
        help="Draw on the workers of a Ray cluster, each with --threads, by default 1. Its nodes "
        "have BUNDLE at the same path. Extra ray.",
    ),
]
OnlyTiming: TypeAlias = Annotated[
    bool, typer.Option(help="Time the presets and stop; a later run reads the result.")
]


def evaluate(
    bundle: BundleFolder,
    model: ModelName = None,
    preset: Presets = None,
    reference: Reference = None,
    yardstick: YardstickName = "converged",
    images: Annotated[int, typer.Option(help="Images drawn with every preset.")] = 256,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("evaluation"),
    work: Work = None,
    reference_work: ReferenceWork = None,
    prompts: Annotated[Path | None, typer.Option(help="Other prompts, one a line.")] = None,
    embeddings: Embeddings = None,
    guidance: Annotated[float | None, typer.Option(help="Default: every preset's own.")] = None,
    seed: Annotated[int, typer.Option(help="Image i uses SEED + i.")] = 0,
    batch: Annotated[int, typer.Option(help="Images drawn in one call.")] = 16,
    resamples: Annotated[int, typer.Option(help="Random halves behind the intervals.")] = 200,
    rounds: Annotated[int, typer.Option(help="Timed rounds; 0: no timing.")] = 5,
    timed_images: Annotated[int, typer.Option(help="Images in one timed call.")] = 4,
    only_timing: OnlyTiming = False,
    backend: BackendName = "auto",
    threads: Threads = None,
    ray: RayAddress = None,
    as_json: AsJson = False,
) -> None:
    """Compare presets with the uncached run and with fewer steps: the paper's Table 1.

    Draws the same images with every preset and writes evaluation.md, evaluation.json and pictures
    into OUT. Interrupted or asked for more images or presets, it goes on from what it has drawn.

    Example: blockcache evaluate demo-out/bundle --reference-work ~/.cache/blockcache/demo/cpu
    """
    from blockcache.runtime import Bundle
    from blockcache.tools.commands.names import preset_of
    from blockcache.tools.commands.outputs import check_folder
    from blockcache.tools.evaluation import run
    from blockcache.tools.evaluation.markdown import markdown
    from blockcache.tools.evaluation.options import DrawOptions, EvaluationOptions, TimingOptions
    from blockcache.tools.report.progress import StageProgress

    draw = DrawOptions(
        images=images, seed=seed, batch=batch, guidance=guidance, backend=backend, threads=threads
    )
    timing = TimingOptions(rounds=rounds, images=timed_images)
    options = EvaluationOptions(
        draw=draw, timing=timing, resamples=resamples, yardstick=cast("Yardstick", yardstick)
    )
    check_folder(out)
    opened = Bundle.open(bundle)
    names = tuple(preset_of(opened, name) for name in preset or ())
    if reference is not None:
        reference = preset_of(opened, reference)
    subject = _subject(opened.model.name, model, images, seed, reference_work, prompts, embeddings)
    with StageProgress() as progress:
        if only_timing:
            kept = work or out / run.WORK
            run.measure_times(opened, subject, options, kept, names, progress, reference)
            return
        with _workers(ray, opened, draw) as workers:
            report = run.evaluate(
                opened, subject, options, out, names, progress, work, reference, workers
            )
    print(report.to_json() if as_json else markdown(report))
    print(f"wrote {out}", file=sys.stderr)


@contextmanager
def _workers(address: str | None, bundle: Bundle, draw: DrawOptions) -> Iterator[Workers | None]:
    """Those of a cluster while the body runs; None where this process draws."""
    if address is None:
        yield None
        return
    from blockcache.tools.evaluation.ray_workers import RayWorkers

    with closing(RayWorkers(address, bundle, draw.backend, draw.threads)) as workers:
        yield workers


def _subject(
    bundle_model: str,
    model: str | None,
    images: int,
    seed: int,
    reference_work: Path | None,
    prompts: Path | None,
    embeddings: Path | None,
) -> Subject:
    """What to draw, from the options."""
    from blockcache.runtime import ConfigError
    from blockcache.tools.evaluation import subject
    from blockcache.tools.sources.models import DEMO

    if embeddings is not None:
        return subject.embeddings_subject(embeddings, images)
    name = model or (DEMO if bundle_model == DEMO else None)
    if name is None:
        raise ConfigError(
            "Expected --model FOLDER (for text encoder and VAE) or --embeddings FILE; got neither."
        )
    if reference_work is not None and (name != DEMO or prompts is not None):
        raise ConfigError(
            "--reference-work holds the demo model's pictures and their captions: use it with "
            "--model demo and without --prompts."
        )
    if name == DEMO and prompts is None:
        return subject.demo_subject(images, seed, reference_work)
    return subject.model_subject(name, images, prompts)
