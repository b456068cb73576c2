"""Prompts to the U-Net's conditions: what the model's own diffusers pipeline would feed.

The pipeline itself runs, up to the first call of its U-Net. Its U-Net and its VAE are replaced by
parts that have their configs but no weights; the stand-in of the U-Net notes what it is called
with. So all that a pipeline does with a prompt is done by the pipeline: zeros for an empty prompt,
time_ids of the picture's size, aesthetic scores.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from blockcache.export.unet.configs import read_json
from blockcache.export.unet.hub import local_folder
from blockcache.export.unet.lora import Lora, adapters_of
from blockcache.export.unet.weights import load_part
from blockcache.runtime.errors import ConfigError, MissingExtraError

Conditions: TypeAlias = dict[str, np.ndarray]
"""By name, float32 [N, ...]."""

_PLAIN = {
    "StableDiffusionInpaintPipeline": "StableDiffusionPipeline",
    "StableDiffusionInstructPix2PixPipeline": "StableDiffusionPipeline",
    "StableDiffusionDepth2ImgPipeline": "StableDiffusionPipeline",
    "StableDiffusionUpscalePipeline": "StableDiffusionPipeline",
    "StableDiffusionXLInpaintPipeline": "StableDiffusionXLPipeline",
    "StableDiffusionXLInstructPix2PixPipeline": "StableDiffusionXLPipeline",
}
"""Pipelines that take pictures beside the prompt, and those that do the same with the prompt."""

_UNUSED = {"safety_checker", "feature_extractor", "image_encoder"}
"""Parts that do nothing to a prompt."""


class _Called(Exception):  # noqa: N818 (an event, not a fault)
    """The pipeline called its U-Net, with ``conditions`` besides sample and timestep."""

    def __init__(self, conditions: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.conditions = conditions


def encode_text(
    source: str | Path,
    prompts: Sequence[str],
    size: tuple[int, int] | None = None,
    loras: Sequence[Lora] = (),
) -> tuple[Conditions, Conditions]:
    """Conditions of prompts, and of guidance's unconditional half, by the source's pipeline.

    Args:
        source: a pipeline's folder or hub id.
        prompts: P of them.
        size: latent (height, width) of the pictures; default the U-Net's own.
        loras: merged into the text encoders.

    Returns:
        Float32 arrays by name: [P, ...] for the prompts, [1, ...] for the unconditional half.

    Raises:
        ConfigError: no text encoders there, or a pipeline that does not draw from prompts alone.
        MissingExtraError: transformers is not installed.
    """
    folder = local_folder(source, ("text_encoder",))
    if not any(path.is_dir() for path in folder.glob("text_encoder*")):
        raise ConfigError(
            f"Expected text_encoder/ in {folder}: the profile needs prompts. Give a pipeline "
            f"folder, or --calibration FILE with encoded prompts."
        )
    pipeline = _pipeline(folder, loras)
    try:
        pipeline(**_request(pipeline, prompts, size))
    except _Called as call:
        given = call.conditions
    except Exception as error:  # pipelines check their arguments each in its own way
        raise ConfigError(
            f"Expected a pipeline that draws from prompts alone at {source}, got a "
            f"{type(pipeline).__name__} that says: {error}. Give --calibration FILE with its "
            f"conditions instead."
        ) from error
    arrays = {name: values.float().numpy() for name, values in given.items()}
    half = len(prompts)  # the unconditional half comes first, one row a prompt, all equal
    positive = {name: values[half:] for name, values in arrays.items()}
    return positive, {name: values[:1] for name, values in arrays.items()}


def _request(
    pipeline: Any, prompts: Sequence[str], size: tuple[int, int] | None
) -> dict[str, object]:
    """A call of a pipeline for text to image, or, as SDXL's refiner is, for image to image."""
    takes = inspect.signature(type(pipeline).__call__).parameters
    request: dict[str, object] = {
        "prompt": list(prompts),
        "guidance_scale": 5.0,  # any that turns guidance on
        "num_inference_steps": 2,
        "output_type": "latent",
    }
    config = pipeline.unet.config
    if size is None:
        own = config.sample_size or 64
        size = (own, own) if isinstance(own, int) else (own[0], own[1])
    if "image" in takes:  # latents pass for an image, and need no VAE
        request |= {"image": torch.zeros(len(prompts), config.in_channels, *size), "strength": 1.0}
    elif "height" in takes:
        scale = pipeline.vae_scale_factor
        request |= {"height": size[0] * scale, "width": size[1] * scale}
    return request


def _pipeline(folder: Path, loras: Sequence[Lora]) -> Any:
    """The folder's pipeline, with text encoders but without other weights."""
    try:
        import diffusers
        import transformers
    except ImportError as error:
        raise MissingExtraError.of("transformers", "export", "Encoding prompts") from error
    index = read_json(folder / "model_index.json")
    named = index.get("_class_name")
    kind = _class_in(diffusers, _PLAIN.get(str(named), named), folder)
    parts: dict[str, Any] = dict.fromkeys(_UNUSED & index.keys())
    for name in (name for name, value in index.items() if isinstance(value, list) and value[1]):
        library, class_name = index[name]
        if name == "unet":
            part, config = _class_in(diffusers, class_name, folder), _config(folder / name)
            config |= {"in_channels": config.get("out_channels", 4)}  # it reads the sample alone
            parts[name] = _without_weights(part, config, forward=_tell)
        elif name == "vae":
            part = _class_in(diffusers, class_name, folder)
            there = (folder / name / "config.json").is_file()
            parts[name] = _without_weights(part, _config(folder / name)) if there else None
        elif name.startswith("tokenizer"):
            _refuse_no_tokenizer(folder / name)
        elif name.startswith("text_encoder") and library == "transformers":
            part = _class_in(transformers, class_name, folder)
            adapters = adapters_of(loras, name, read_json(folder / "unet" / "config.json"))
            parts[name] = load_part(part, folder / name, spare=True, adapters=adapters)
    if "requires_safety_checker" in inspect.signature(kind.__init__).parameters:
        parts["requires_safety_checker"] = False
    try:
        pipeline = kind.from_pretrained(folder, use_safetensors=True, **parts)
    except Exception as error:  # OSError, ValueError, TypeError, ... by what is missing
        raise ConfigError(
            f"Expected a pipeline with text encoders at {folder}, got: {error}. Give a pipeline "
            f"folder, or --calibration FILE with encoded prompts."
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _config(folder: Path) -> dict[str, Any]:
    """A part's config."""
    return dict(read_json(folder / "config.json"))


def _class_in(library: Any, name: object, folder: Path) -> Any:
    """A class that model_index.json names."""
    found = getattr(library, str(name), None)
    if found is None:
        raise ConfigError(
            f"Expected the name of a class of {library.__name__} in {folder}/model_index.json, got "
            f"{name!r}. Give a folder that save_pretrained wrote, or --calibration FILE with "
            f"encoded prompts."
        )
    return found


def _refuse_no_tokenizer(folder: Path) -> None:
    """Raise ConfigError where there is none: transformers would make one that knows no word."""
    if not folder.is_dir() or not any(path.is_file() for path in folder.iterdir()):
        raise ConfigError(
            f"Expected the files of a tokenizer in {folder}, found none. Fetch the folder again."
        )


def _without_weights(kind: Any, config: dict[str, Any], **members: Any) -> Any:
    """A part of a config that says that it is on the CPU; ``members`` replace its own."""
    made: Any = type(kind.__name__, (kind,), {"device": torch.device("cpu"), **members})
    with torch.device("meta"):
        return made.from_config(config)


def _tell(
    self: object,
    sample: torch.Tensor,
    timestep: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    added_cond_kwargs: dict[str, torch.Tensor] | None = None,
    **_: object,
) -> None:
    """In the place of a U-Net's ``forward``: raises ``_Called`` with the conditions."""
    given = {"encoder_hidden_states": encoder_hidden_states, "class_labels": class_labels}
    given |= added_cond_kwargs or {}
    raise _Called({name: value for name, value in given.items() if value is not None})
