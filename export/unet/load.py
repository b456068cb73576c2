"""Load the U-Net of a diffusers folder or hub id.

The folder holds ``unet/`` and, optionally, ``scheduler/`` and ``tokenizer/``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from blockcache.export.unet.hub import local_folder
from blockcache.export.unet.model import (
    DEFAULT_TOKENS,
    TORCH_DTYPES,
    SourceModel,
    check_supported,
    describe,
)
from blockcache.runtime.errors import ConfigError, MissingExtraError


def load_model(
    source: str | Path,
    *,
    dtype: str = "float32",
    name: str | None = None,
    cached: str = "transformers",
) -> SourceModel:
    """Load the U-Net of a diffusers folder or hub id in ``dtype``, ready for inference.

    Args:
        source: the folder, or a hub id such as "owner/model".
        dtype: of the weights in memory: float32, float16 or bfloat16.
        name: what the bundle calls the model; default the folder's name.
        cached: what the blocks are, a key of ``BLOCK_CLASSES``.

    Raises:
        ConfigError: no such folder, or one without a U-Net.
        UnsupportedModelError: the U-Net has a feature that the exporter refuses.
        MissingExtraError: diffusers is not installed.
    """
    try:
        from diffusers import UNet2DConditionModel
    except ImportError as error:
        raise MissingExtraError.of("diffusers", "export", "Loading a U-Net") from error
    folder = local_folder(source)
    unet_folder = folder / "unet" if (folder / "unet").is_dir() else folder
    config_path = unet_folder / "config.json"
    if not config_path.is_file():
        raise ConfigError(
            f"Expected a diffusers folder with unet/config.json at {folder}; it has none. "
            f"Give the folder that save_pretrained wrote."
        )
    config = json.loads(config_path.read_text())
    check_supported(config)
    variant = None if _has_plain_weights(unet_folder) else _variant(unet_folder)
    unet = UNet2DConditionModel.from_pretrained(
        unet_folder, variant=variant, torch_dtype=TORCH_DTYPES[dtype], use_safetensors=True
    )
    return describe(
        unet,
        name=name or Path(source).resolve().name,
        scheduler=_read_json(folder / "scheduler" / "scheduler_config.json"),
        tokens=_tokens(folder),
        sha256=_hash_folder(unet_folder),
        cached=cached,
    )


def _has_plain_weights(folder: Path) -> bool:
    return (folder / "diffusion_pytorch_model.safetensors").is_file() or (
        folder / "diffusion_pytorch_model.safetensors.index.json"
    ).is_file()


def _variant(folder: Path) -> str:
    """The weights' variant ("fp16", ...) where the folder holds no plain file."""
    for path in sorted(folder.glob("diffusion_pytorch_model*.safetensors*")):
        return path.name.split(".")[1].split("-")[0]
    raise ConfigError(
        f"Expected diffusion_pytorch_model*.safetensors in {folder}, found none. blockcache reads "
        f"safetensors only; convert other weights with save_pretrained."
    )


def _tokens(folder: Path) -> int:
    """Prompt length: the tokenizer's, else CLIP's."""
    config = _read_json(folder / "tokenizer" / "tokenizer_config.json")
    length = config.get("model_max_length", DEFAULT_TOKENS)
    return int(length) if length < 4096 else DEFAULT_TOKENS


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return content


def _hash_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.suffix in (".json", ".safetensors"):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
    return digest.hexdigest()
