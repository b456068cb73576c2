"""What is drawn and what it is judged against: prompts, decoder, real pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blockcache.runtime.errors import ConfigError
from blockcache.tools.sources.codecs import DemoCodec, codec_for
from blockcache.tools.sources.models import DEMO
from blockcache.tools.sources.prompts import calibration_for, read_prompts

Conditions = dict[str, np.ndarray]


@dataclass(frozen=True)
class RealPictures:
    """A reference set of real pictures, of which some have the captions that are drawn."""

    pictures: np.ndarray  # uint8 [M, 3, H, W]
    styles: np.ndarray  # str [M]
    concepts: np.ndarray  # str [M]
    chosen: np.ndarray  # int [N]: image i is drawn from the caption of picture chosen[i]
    folder: Path  # where their features are kept


@dataclass(frozen=True)
class Subject:
    """N images to draw."""

    captions: tuple[str, ...]  # of the prompts, P
    prompts: np.ndarray  # int [N]: image i is drawn from prompt prompts[i]
    positive: Mapping[str, np.ndarray]  # float32 [P or 1, ...]
    negative: Mapping[str, np.ndarray]  # the unconditional prompt, [P or 1, ...]
    about: str  # one sentence for the report
    decode: Callable[[np.ndarray], np.ndarray] | None = None  # to uint8 [n, H, W, 3]
    decoder: str = ""  # changes with the decoder's weights
    real: RealPictures | None = None

    def conditions(self, images: Sequence[int]) -> tuple[Conditions, Conditions]:
        """Positive and negative conditions of some images."""
        return self._pick(self.positive, images), self._pick(self.negative, images)

    def caption(self, image: int) -> str:
        """What image ``image`` is drawn from."""
        return self.captions[int(self.prompts[image])]

    def _pick(self, side: Mapping[str, np.ndarray], images: Sequence[int]) -> Conditions:
        rows = self.prompts[list(images)]
        return {name: v if len(v) == 1 else v[rows] for name, v in side.items()}


def demo_subject(images: int, seed: int, work: Path | None) -> Subject:
    """The demo model on its own captions.

    Args:
        images: N.
        seed: which captions, in which order.
        work: the folder of ``python -m blockcache.tools.demo data``; without it the captions are
            the default prompts, over and over, and there are no real pictures.
    """
    if work is not None:
        return _with_real_pictures(images, seed, work)
    from blockcache.tools.demo.model import default_prompts

    captions, codec = default_prompts(), DemoCodec()
    positive, negative = codec.encode(captions)
    return Subject(
        captions=tuple(captions),
        prompts=np.arange(images) % len(captions),
        positive=positive,
        negative=negative,
        about=f"{len(captions)} default prompts of the demo model, taken in turn",
        decode=codec.decode,
        decoder=_demo_decoder(),
    )


def model_subject(model: str, images: int, prompts: Path | None) -> Subject:
    """A diffusers folder on a file of prompts, or on the built-in ones."""
    from blockcache.export.measure.calibration import PROMPTS

    codec = codec_for(model)
    calibration = calibration_for(model, None, prompts)
    captions = PROMPTS if prompts is None else tuple(read_prompts(prompts))
    return Subject(
        captions=captions,
        prompts=np.arange(images) % len(captions),
        positive=calibration.positive,
        negative=calibration.negative,
        about=f"{len(captions)} prompts, taken in turn",
        decode=codec.decode,
        decoder=_demo_decoder() if model == DEMO else f"{model} {_folder_key(Path(model) / 'vae')}",
    )


def embeddings_subject(file: Path, images: int) -> Subject:
    """Encoded prompts from a file; no decoder, so latents alone are compared."""
    from blockcache.export import read_calibration

    calibration = read_calibration(file)
    return Subject(
        captions=tuple(f"prompt {index}" for index in range(calibration.prompts)),
        prompts=np.arange(images) % calibration.prompts,
        positive=calibration.positive,
        negative=calibration.negative,
        about=f"{calibration.prompts} encoded prompts of {file.name}, taken in turn",
    )


def _with_real_pictures(images: int, seed: int, work: Path) -> Subject:
    from blockcache.tools.demo import contexts, data

    try:
        dataset, states = data.load(work), contexts.load(work)
    except ConfigError as error:
        raise ConfigError(
            f"Expected the demo's pictures in {work}, found none. Make them with python -m "
            f"blockcache.tools.demo data, or leave out --reference-work."
        ) from error
    order = np.random.default_rng(seed).permutation(len(dataset.images))
    chosen = np.resize(order, images)
    pictures = dataset.pictures
    return Subject(
        captions=tuple(picture.caption for picture in pictures),
        prompts=chosen,
        positive={"encoder_hidden_states": states[:-1].float().numpy()},
        negative={"encoder_hidden_states": states[-1:].float().numpy()},
        about=f"{images} random captions of {len(pictures)} real pictures, which are the reference",
        decode=DemoCodec().decode,
        decoder=_demo_decoder(),
        real=RealPictures(
            pictures=dataset.images,
            styles=np.array([picture.style for picture in pictures]),
            concepts=np.array([picture.words for picture in pictures]),
            chosen=chosen,
            folder=work / "features",
        ),
    )


def _demo_decoder() -> str:
    from blockcache.tools.demo.model import MODEL_DIR

    return f"{DEMO} {_folder_key(MODEL_DIR / 'vae')}"


def _folder_key(folder: Path) -> str:
    """Names, sizes and times of a folder's files: enough to notice other weights."""
    content = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            facts = path.stat()
            content.update(f"{path.name} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return content.hexdigest()[:16]
