"""Calibration: the prompts that measurements run on, as the model's own conditions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from blockcache.export.unet.text import encode_text
from blockcache.runtime.errors import ConfigError
from blockcache.runtime.tensor_files import read_tensors

NEGATIVE = "negative."
"""Prefix of the unconditional prompt's tensors in a calibration file."""

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
        return max(len(values) for values in self.positive.values())

    @property
    def sha256(self) -> str:
        """Of all names, shapes and values."""
        digest = hashlib.sha256()
        for side in (self.positive, self.negative):
            for name, values in sorted(side.items()):
                digest.update(f"{name} {values.dtype} {values.shape}".encode())
                digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    def pick(self, indices: Sequence[int], guided: bool) -> dict[str, torch.Tensor]:
        """Conditions of some prompts, the unconditional half first where guided."""
        picked = {}
        for name, values in self.positive.items():
            halves = [_rows(values, indices)]
            if guided:
                halves.insert(0, _rows(self.negative.get(name, values), indices))
            picked[name] = torch.from_numpy(np.concatenate(halves))
        return picked


def _rows(values: np.ndarray, indices: Sequence[int]) -> np.ndarray:
    return values[[0 if len(values) == 1 else index for index in indices]]


def read_calibration(path: Path) -> Calibration:
    """Read a safetensors file of conditions; ``negative.NAME`` is the unconditional NAME."""
    if not path.is_file():
        raise ConfigError(f"Expected a calibration file at {path}, found none.")
    tensors = read_tensors(path)
    negative = {
        name.removeprefix(NEGATIVE): values
        for name, values in tensors.items()
        if name.startswith(NEGATIVE)
    }
    positive = {name: v for name, v in tensors.items() if not name.startswith(NEGATIVE)}
    if "encoder_hidden_states" not in positive or "encoder_hidden_states" not in negative:
        raise ConfigError(
            f"Expected the tensors encoder_hidden_states [P, tokens, D] and "
            f"negative.encoder_hidden_states [1, tokens, D] in {path}, got {sorted(tensors)}."
        )
    return Calibration(positive, negative)


def encode_prompts(source: str | Path, prompts: Sequence[str] = PROMPTS) -> Calibration:
    """Encode prompts with the text encoders of a diffusers pipeline (SD 1.x, 2.x, XL)."""
    return Calibration(*encode_text(source, prompts))
