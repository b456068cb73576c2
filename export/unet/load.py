"""Load the U-Net of a diffusers folder or hub id.

The folder holds ``unet/`` and, optionally, ``scheduler/`` and ``tokenizer/``; or it is ``unet/``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockcache.export.unet.configs import read_json
from blockcache.export.unet.control import check_controlnet
from blockcache.export.unet.extra_inputs import find_extra_inputs
from blockcache.export.unet.hub import local_folder, model_name, single_file
from blockcache.export.unet.lora import (
    Lora,
    adapters_of,
    merged_sha256,
    require_parts,
)
from blockcache.export.unet.model import (
    DEFAULT_TOKENS,
    TORCH_DTYPES,
    SourceModel,
    check_supported,
    describe,
    hash_models,
)
from blockcache.export.unet.weights import hash_part, load_part
from blockcache.runtime.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from diffusers import ControlNetModel


def load_model(
    source: str | Path,
    *,
    dtype: str = "float32",
    name: str | None = None,
    cached: str = "transformers",
    variant: str | None = None,
    loras: Sequence[Lora] = (),
    extra_inputs: str | None = None,
    controlnets: Sequence[str | Path] = (),
) -> SourceModel:
    """Load the U-Net of a diffusers folder or hub id in ``dtype``, ready for inference.

    Args:
        source: the folder, or a hub id such as "owner/model".
        dtype: of the weights in memory: float32, float16 or bfloat16.
        name: what the bundle calls the model; default the folder's name.
        cached: what the blocks are, a key of ``BLOCK_CLASSES``.
        variant: of the weights, such as "ema"; default the plain ones, else fp16 or bf16.
        loras: merged into the weights, in this order.
        extra_inputs: what a U-Net with more input channels reads in them: "inpaint",
            "instruct-pix2pix", "depth2img", "upscale", or names and channels, such as
            "mask:1,masked_image_latents:4". By default what the pipeline's class says, or, where
            there is none, the number of channels.
        controlnets: folders or hub ids of ControlNets, which run with the U-Net and add up.

    Raises:
        ConfigError: no such folder, one without a U-Net, weights that are not whole, or a LoRA or
            a ControlNet that does not fit.
        UnsupportedModelError: U-Net or ControlNet has a feature that the exporter refuses.
        MissingExtraError: diffusers is not installed.
    """
    try:
        from diffusers import UNet2DConditionModel
    except ImportError as error:
        raise MissingExtraError.of("diffusers", "export", "Loading a U-Net") from error
    folder = local_folder(source, variant=variant)
    unet_folder = folder / "unet" if (folder / "unet").is_dir() else folder
    if not (unet_folder / "config.json").is_file():
        for checkpoint in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.ckpt")):
            if not checkpoint.name.startswith("diffusion_pytorch_model"):
                raise ConfigError(single_file(checkpoint))
        raise ConfigError(
            f"Expected a diffusers folder with unet/config.json at {folder}; it has none. "
            f"Give the folder that save_pretrained wrote."
        )
    config = read_json(unet_folder / "config.json")
    check_supported(config)
    kind = read_json(folder / "model_index.json").get("_class_name")
    extra = find_extra_inputs(config, kind, extra_inputs)
    if (folder / "model_index.json").is_file():
        require_parts(loras, folder, config)
    adapters = adapters_of(loras, "unet", config)
    beside = [local_folder(each) for each in controlnets]
    for each in beside:
        _check_control_folder(each, config)
    unet = load_part(
        UNet2DConditionModel, unet_folder, TORCH_DTYPES[dtype], variant, adapters=adapters
    )
    return describe(
        unet,
        name=name or model_name(folder),
        scheduler=read_json(folder / "scheduler" / "scheduler_config.json"),
        tokens=_tokens(folder),
        sha256=hash_models(
            [merged_sha256(hash_part(unet_folder, variant), adapters), *map(hash_part, beside)]
        ),
        cached=cached,
        pooled=read_json(folder / "text_encoder_2" / "config.json").get("projection_dim"),
        loras=loras,
        extra_inputs=extra,
        controlnets=[_load_controlnet(each, dtype) for each in beside],
    )


def _check_control_folder(folder: Path, unet_config: Mapping[str, Any]) -> None:
    """Refuse what is no ControlNet for this U-Net, by its config alone."""
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"Expected a ControlNet's folder with config.json at {folder}; it has none. Give the "
            f"folder that save_pretrained wrote."
        )
    check_controlnet(read_json(folder / "config.json"), unet_config)


def _load_controlnet(folder: Path, dtype: str) -> ControlNetModel:
    """A ControlNet in ``dtype``."""
    from diffusers import ControlNetModel

    net: ControlNetModel = load_part(ControlNetModel, folder, TORCH_DTYPES[dtype])
    return net


def _tokens(folder: Path) -> int:
    """Prompt length: the tokenizer's, else CLIP's. SDXL's refiner has the second one only."""
    paths = [folder / name / "tokenizer_config.json" for name in ("tokenizer", "tokenizer_2")]
    configs = [read_json(path) for path in paths if path.is_file()]
    length = configs[0].get("model_max_length") if configs else None
    return int(length) if isinstance(length, int | float) and length < 4096 else DEFAULT_TOKENS
