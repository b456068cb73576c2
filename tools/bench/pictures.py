"""From prompt to picture: text encoders and decoder, which no schedule makes faster.

They take turns with the denoising. So what a preset gains is told twice: over the denoising alone,
and over the whole request.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from blockcache.runtime import Bundle, Pipeline, Preset, Session
from blockcache.runtime.engines.engine import Backend
from blockcache.tools.bench.contestants import PARTS, Contestant, Entry, PartKind
from blockcache.tools.report.spread import Spread


@dataclass(frozen=True)
class PictureRow:
    """A request from prompt to picture, in its parts: seconds, and how much faster than the first.

    The first row is the uncut model on the first engine that has all parts.
    """

    engine: str
    kind: str
    preset: str
    text: Spread
    denoising: Spread
    decoding: Spread
    total: Spread
    parts_share: float  # of the total: text and decoding, median
    denoising_speedup: Spread
    total_speedup: Spread


def fresh_prompts(images: int) -> Callable[[], list[str]]:
    """A function that gives prompts which it has not given before: no cache knows them."""
    numbers = itertools.count()
    return lambda: [f"a picture of {next(numbers)} foxes" for _ in range(images)]


def bundle_parts(
    bundle: Bundle, preset: Preset, backend: Backend, engine: str, images: int
) -> Iterator[Entry]:
    """Text encoders and decoder of a bundle; ConfigError on opening one that has none."""

    def open_it(kind: PartKind) -> Contestant:
        pipeline = Pipeline(Session(bundle, preset, backend))
        sizes, channels = bundle.model.sizes, bundle.model.channels
        latents = np.zeros((images, channels, sizes.height, sizes.width), np.float32)
        prompts = fresh_prompts(images)
        runs: dict[PartKind, Callable[[], object]] = {
            "text": lambda: pipeline.encode_prompt(prompts()),
            "decoding": lambda: pipeline.decode(latents),
        }
        return part_contestant(engine, kind, images, runs[kind])

    for kind in PARTS:
        yield Entry(f"{engine} {kind}", partial(open_it, kind))


def part_contestant(
    engine: str, kind: PartKind, images: int, run: Callable[[], object]
) -> Contestant:
    """A part as it takes turns; it follows no preset."""

    def once() -> None:
        run()

    return Contestant(
        engine=engine, kind=kind, preset="", base="", steps=0, images=images, run=once
    )


def picture_rows(everyone: Sequence[Contestant]) -> list[PictureRow]:
    """Every denoising with the parts of its engine; nothing where no engine has both."""
    parts = {(made.engine, made.kind): made.seconds for made in everyone if made.kind in PARTS}
    rows: list[PictureRow] = []
    first: tuple[list[float], list[float]] | None = None
    for made in everyone:
        text, decoding = (parts.get((_with_parts(made), kind)) for kind in PARTS)
        if made.kind in PARTS or text is None or decoding is None:
            continue
        total = [sum(times) for times in zip(text, made.seconds, decoding, strict=True)]
        first = first or (made.seconds, total)
        rest = [1 - own / whole for own, whole in zip(made.seconds, total, strict=True)]
        rows.append(
            PictureRow(
                engine=made.engine,
                kind=made.kind,
                preset=made.preset,
                text=Spread.of(text),
                denoising=Spread.of(made.seconds),
                decoding=Spread.of(decoding),
                total=Spread.of(total),
                parts_share=Spread.of(rest).median,
                denoising_speedup=Spread.of_ratio(first[0], made.seconds),
                total_speedup=Spread.of_ratio(first[1], total),
            )
        )
    return rows


TORCH_PEERS = ("torch-compile", "deepcache", "diffusers-pab")
"""They change the U-Net alone: text encoder and decoder are those of ``torch``."""


def _with_parts(made: Contestant) -> str:
    """The engine that runs the parts beside a denoising."""
    return "torch" if made.engine in TORCH_PEERS else made.library
