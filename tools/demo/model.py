"""The shipped demo model: where it lies, its prompts, and its latents as pictures.

>>> from blockcache.tools.demo import model
>>> model.prompt_embeddings(["twitter emoji, red apple"]).shape
(1, 20, 384)
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from blockcache.runtime.errors import MissingExtraError
from blockcache.tools.demo.prompts import EMPTY

if TYPE_CHECKING:
    from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel

    from blockcache.tools.demo.autoencoder import TinyAutoencoder


def _model_dir() -> Path:
    """The checkout's own folder, else what the distribution blockcache-demo installed."""
    own = Path(__file__).parent / "pretrained"
    installed = None if own.is_dir() else find_spec("blockcache_demo")
    if installed is None or not installed.submodule_search_locations:
        return own
    return Path(installed.submodule_search_locations[0])


MODEL_DIR = _model_dir()
RESULTS_DIR = Path(__file__).parent / "results"
PROMPTS_FILE = "prompts.safetensors"
VARIANT = "fp16"
DECODE_BATCH = 64


def weights_dir() -> Path:
    """``MODEL_DIR``, or an error that says how to install it."""
    if not (MODEL_DIR / PROMPTS_FILE).is_file():
        raise MissingExtraError(
            "The demo needs the weights of its model, which are not installed. Install them with: "
            "pip install blockcache-demo"
        )
    return MODEL_DIR


@functools.lru_cache(maxsize=4)
def _precomputed(folder: Path) -> dict[str, np.ndarray]:
    from safetensors import safe_open

    with safe_open(folder / PROMPTS_FILE, framework="np") as file:
        prompts = json.loads(file.metadata()["prompts"])
        states = file.get_tensor("embeddings").astype(np.float32)
    return dict(zip(prompts, states, strict=True))


def default_prompts() -> list[str]:
    """The prompts that need no text encoder; the empty prompt is not among them."""
    return [prompt for prompt in _precomputed(weights_dir()) if prompt != EMPTY]


def prompt_embeddings(prompts: Sequence[str]) -> np.ndarray:
    """What the U-Net attends to: float32 [N, 20, 384].

    Default prompts and "" are read from the model folder; others need MiniLM's package.
    """
    known = _precomputed(weights_dir())
    unknown = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
    if unknown:
        from blockcache.tools.demo import text

        known = known | dict(zip(unknown, text.encode(unknown), strict=True))
    return np.stack([known[prompt] for prompt in prompts])


def check_text_encoder() -> None:
    """Raise MissingExtraError where MiniLM's package is not installed."""
    from blockcache.tools.demo import text

    text.folder()


def load_unet(folder: Path = MODEL_DIR) -> UNet2DConditionModel:
    """The U-Net in float32, ready for inference."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(
        folder / "unet", variant=VARIANT, use_safetensors=True
    )
    return unet.float().eval()


def load_autoencoder(folder: Path = MODEL_DIR) -> TinyAutoencoder:
    """The autoencoder in float32, ready for inference."""
    from blockcache.tools.demo.autoencoder import TinyAutoencoder

    autoencoder = TinyAutoencoder.from_pretrained(
        folder / "vae", variant=VARIANT, use_safetensors=True
    )
    return autoencoder.float().eval()


def load_scheduler(folder: Path = MODEL_DIR) -> DPMSolverMultistepScheduler:
    """The sampling scheduler, DPM-Solver++ (2M)."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler.from_pretrained(folder / "scheduler")


@functools.lru_cache(maxsize=1)
def _autoencoder() -> TinyAutoencoder:
    return load_autoencoder()


def decode(latents: np.ndarray) -> np.ndarray:
    """Latents [N, 4, h, w] as pictures: uint8 [N, 4h, 4w, 3]."""
    import torch

    if latents.ndim != 4 or latents.shape[1] != 4:
        raise ValueError(f"latents: expected shape [N, 4, h, w], got {list(latents.shape)}")
    images = []
    with torch.inference_mode():
        for start in range(0, len(latents), DECODE_BATCH):
            chunk = torch.from_numpy(latents[start : start + DECODE_BATCH].astype(np.float32))
            images.append(_autoencoder().decode(chunk).numpy())
    return to_uint8(np.concatenate(images)).transpose(0, 2, 3, 1)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[-1, 1] to 0..255, rounded."""
    return (np.clip(images, -1, 1) * 127.5 + 128).clip(0, 255).astype(np.uint8)
