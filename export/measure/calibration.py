"""Calibration: the prompts that measurements run on, as the model's own conditions."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from blockcache.export.measure.encoded_prompts import NEGATIVE, read_encoded_prompts
from blockcache.export.unet.lora import Lora
from blockcache.export.unet.model import Condition, SourceModel
from blockcache.export.unet.text import encode_text
from blockcache.runtime.errors import ConfigError
from blockcache.runtime.plan import IMAGE_LATENTS, Sizes, default_negative

PROMPTS = (
    "a photograph of a lighthouse at dusk",
    "an oil painting of a sailing ship in a storm",
    "a bowl of ramen on a wooden table",
    "portrait of an old fisherman, studio light",
    "a red bicycle leaning on a brick wall",
    "a city street in the rain at night, neon signs",
    "a watercolor of two foxes in the snow",
    "an astronaut walking on a beach",
    "a close-up of a dew covered spider web",
    "a cabin in a pine forest, morning mist",
    "a still life with lemons and a blue vase",
    "a golden retriever puppy running through grass",
    "an isometric drawing of a tiny library",
    "a steam train crossing a stone bridge",
    "a black and white photo of a jazz trio",
    "a field of lavender under a clear sky",
    "a robot watering plants in a greenhouse",
    "macro photo of a bee on a sunflower",
    "a medieval castle on a cliff, concept art",
    "a stack of pancakes with berries",
    "children flying kites on a hill",
    "an origami crane on a mirror",
    "a snowy mountain range at sunrise",
    "a vintage car parked by the sea",
    "a ceramic teapot shaped like an elephant",
    "a crowded market with hanging lanterns",
    "a minimalist living room with large windows",
    "an owl sitting on a branch, pencil drawing",
    "a hot air balloon above a canyon",
    "a glass chess set, dramatic light",
    "a koi pond seen from above",
    "a violin maker in his workshop",
)
"""Plain prompts for text-to-image models; 32, as in section 3.2 of the paper."""


@dataclass(frozen=True)
class Calibration:
    """Prompts to measure with: the model's conditions, by name, float32 [P or 1, ...]."""

    positive: Mapping[str, np.ndarray]
    negative: Mapping[str, np.ndarray]  # the unconditional prompt, [1, ...] or [P, ...]

    @property
    def prompts(self) -> int:
        """P."""
        return max((len(values) for values in self.positive.values()), default=0)

    @property
    def sha256(self) -> str:
        """Of all names, shapes and values."""
        digest = hashlib.sha256()
        for side, tensors in (("positive", self.positive), ("negative", self.negative)):
            for name, values in sorted(tensors.items()):
                digest.update(f"{side} {name} {values.dtype} {values.shape}".encode())
                digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    def unconditional(self, name: str) -> np.ndarray:
        """A condition of the unconditional half: the one given, or its default.

        Raises:
            ConfigError: it is not given and has no default.
        """
        given = self.negative.get(name)
        made = default_negative(name, self.positive[name]) if given is None else given
        if made is None:
            raise ConfigError(
                f"Calibration: expected {NEGATIVE}{name}, guidance's unconditional half, got "
                f"{sorted(self.negative)}. Add it, or turn guidance off."
            )
        return made

    def pick(
        self, indices: Sequence[int], guided: bool, by_image: bool = False
    ) -> dict[str, torch.Tensor]:
        """Conditions of some prompts, the unconditional half first where guided.

        In thirds where guided by an image, too, as InstructPix2Pix is: without anything, with the
        image, with image and prompt.
        """
        picked = {}
        for name, values in self.positive.items():
            parts = [_rows(values, indices)]
            if guided and by_image:
                image = name == IMAGE_LATENTS
                without = self.negative.get(name, np.zeros_like(values[:1])) if image else None
                other = self.unconditional(name) if without is None else without
                parts = [
                    _rows(other, indices),
                    parts[0] if image else _rows(other, indices),
                    *parts,
                ]
            elif guided:
                parts.insert(0, _rows(self.unconditional(name), indices))
            picked[name] = torch.from_numpy(np.concatenate(parts))
        return picked


def check_calibration(
    model: SourceModel, calibration: Calibration, guided: bool, made: Collection[str] = ()
) -> None:
    """Raise ConfigError where the model cannot run on a calibration, by the tensor's name.

    Names, widths, dtypes, class numbers and finiteness are checked; with ``guided`` in both halves.
    Conditions that are ``made`` later may all be missing.
    """
    if calibration.prompts < 1:
        raise ConfigError("Calibration: expected one prompt or more, got none. Encode some.")
    known = [condition.name for condition in model.conditions]
    for name in (*calibration.positive, *calibration.negative):
        if name not in known:
            raise ConfigError(
                f"Calibration: expected the conditions {known} of {model.name!r}, got {name!r} "
                f"too. Leave it out, or take the model that it was encoded for."
            )
    later = () if any(name in calibration.positive for name in made) else made
    for condition in model.conditions:
        name = condition.name
        if name in later:
            continue
        if name not in calibration.positive:
            raise ConfigError(
                f"Calibration: expected {name}, which {model.name!r} needs, got "
                f"{sorted(calibration.positive)}. Add it."
            )
        halves = {name: calibration.positive[name]}
        if guided:
            halves[f"{NEGATIVE}{name}"] = calibration.unconditional(name)
        for title, values in halves.items():
            _check_tensor(model, condition, title, values, calibration.prompts)
        lengths = {values.shape[1] for values in halves.values() if "tokens" in condition.shape}
        if len(lengths) > 1:
            raise ConfigError(
                f"Calibration: expected {name} of one length in both halves, got {sorted(lengths)} "
                f"tokens. Pad the prompts alike."
            )


def _check_tensor(
    model: SourceModel, condition: Condition, title: str, values: np.ndarray, prompts: int
) -> None:
    """One half of a condition: [1 or P, ...]."""
    wanted = np.dtype(np.int64 if condition.dtype == "int64" else np.float32)
    if values.dtype != wanted:
        raise ConfigError(
            f"Calibration: expected {title} in {wanted}, got {values.dtype}. Convert it with "
            f".astype(np.{wanted})."
        )
    rows = (1, prompts)
    if not any(_fits(condition, values.shape, model.sizes(batch=batch)) for batch in rows):
        usual = condition.sized(model.sizes(batch=prompts))
        told = {"batch": f"1 or {prompts}", "tokens": "tokens"}
        shape = ", ".join(
            told.get(str(size), str(number))
            for size, number in zip(condition.shape, usual, strict=True)
        )
        raise ConfigError(
            f"Calibration: expected {title} of shape [{shape}] for {model.name!r}, got "
            f"{list(values.shape)}. Encode the prompts for this model."
        )
    if not np.isfinite(values).all():
        raise ConfigError(f"Calibration: expected finite numbers in {title}, got NaN or infinity.")
    classes = model.unet.config.num_class_embeds
    if condition.dtype == "int64" and not ((values >= 0) & (values < classes)).all():
        raise ConfigError(
            f"Calibration: expected {title} of 0 to {classes - 1}, the classes of {model.name!r}, "
            f"got {values.min()} to {values.max()}."
        )


def _fits(condition: Condition, shape: Sequence[int], sizes: Sizes) -> bool:
    """Whether a shape is the condition's; prompts may be of any length."""
    return len(shape) == len(condition.shape) and all(
        size == "tokens" or wanted == got
        for size, wanted, got in zip(condition.shape, condition.sized(sizes), shape, strict=True)
    )


def _rows(values: np.ndarray, indices: Sequence[int]) -> np.ndarray:
    return values[[0 if len(values) == 1 else index for index in indices]]


def read_calibration(path: Path) -> Calibration:
    """Read a file of encoded prompts."""
    return Calibration(*read_encoded_prompts(path))


def encode_prompts(
    source: str | Path, prompts: Sequence[str] = PROMPTS, loras: Sequence[Lora] = ()
) -> Calibration:
    """What the source's own diffusers pipeline makes of prompts, at the model's own size.

    ``loras`` are merged into its text encoders.
    """
    return Calibration(*encode_text(source, prompts, loras=loras))
