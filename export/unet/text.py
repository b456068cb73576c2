"""Prompts to the U-Net's conditions, by the text encoders of a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from blockcache.runtime.errors import ConfigError


def encode_text(
    source: str | Path, prompts: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Conditions of prompts and of the empty prompt, by the source's own text encoders.

    Returns float32 arrays by name: [P or 1, ...] for the prompts, [1, ...] for the empty one.
    """
    from diffusers import DiffusionPipeline

    folder = Path(source)
    if folder.is_dir() and not (folder / "text_encoder").is_dir():
        raise ConfigError(
            f"Expected text_encoder/ in {folder}: the profile needs prompts. Give a pipeline "
            f"folder, or --calibration FILE with encoded prompts."
        )
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            str(source), unet=None, vae=None, safety_checker=None
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"Expected a pipeline with text encoders at {source}, got: {error}. Give a pipeline "
            f"folder, or --calibration FILE with encoded prompts."
        ) from error
    with torch.no_grad():
        positive, negative, *pooled = pipeline.encode_prompt(
            list(prompts),
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            negative_prompt=[""] * len(prompts),
        )
    conditions = {"encoder_hidden_states": positive}
    unconditional = {"encoder_hidden_states": negative[:1]}
    if pooled:
        size = float(pipeline.default_sample_size * pipeline.vae_scale_factor)
        conditions["text_embeds"], unconditional["text_embeds"] = pooled[0], pooled[1][:1]
        conditions["time_ids"] = torch.tensor([[size, size, 0, 0, size, size]])
    return (
        {name: tensor.float().numpy() for name, tensor in conditions.items()},
        {name: tensor.float().numpy() for name, tensor in unconditional.items()},
    )
