"""The parts beside the U-Net of a diffusers folder or hub id, described and not yet loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from blockcache.export.parts.autoencoders import Decoder, Encoder
from blockcache.export.parts.part import Part, Parts
from blockcache.export.parts.text_encoders import ClipStates
from blockcache.export.parts.tokenizer import tokenizer_file
from blockcache.export.unet.configs import read_json
from blockcache.export.unet.extra_inputs import KINDS, find_extra_inputs
from blockcache.export.unet.hub import local_folder
from blockcache.export.unet.lora import Lora, adapters_of, merged_sha256
from blockcache.export.unet.weights import hash_part, load_part
from blockcache.runtime.errors import ConfigError, MissingExtraError
from blockcache.runtime.plan import IMAGE_LATENTS

TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")
"""Classes of transformers and of diffusers that have been exported and compared."""

UPSCALER_FACTOR, MOST_NOISE = 0.08333, 350
"""What StableDiffusionUpscalePipeline scales latents by, whatever the config of its VAE says, and
how much it noises the small picture at most, where its index does not tell."""


def load_parts(
    source: str | Path,
    *,
    clip_skip: int | None = None,
    loras: Sequence[Lora] = (),
    extra_inputs: str | None = None,
) -> Parts:
    """What stands beside the U-Net of a pipeline; its weights are read when they are exported.

    Args:
        source: a folder, or a hub id such as "owner/model".
        clip_skip: so many of CLIP's last layers are left out, as diffusers' pipelines have it.
        loras: merged into the text encoders, where they hold anything for them.
        extra_inputs: as ``load_model`` has it: InstructPix2Pix's encoder is another.

    Returns:
        What can be exported, and by name why the rest cannot. A bare U-Net has no parts.

    Raises:
        ConfigError: no such folder, or a LoRA that is none.
        MissingExtraError: diffusers or transformers is not installed.
    """
    try:
        import diffusers  # noqa: F401 (whether they are there)
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingExtraError.of("transformers", "export", "Exporting a pipeline") from error
    folder = local_folder(source, ("text_encoder", "vae"))
    index = read_json(folder / "model_index.json")
    parts: list[Part] = []
    refused: dict[str, str] = {}
    large = _class(index, "text_encoder_2") is not None  # SDXL, and its refiner
    if large and clip_skip is None:
        skip: int | None = 0
    else:
        skip = clip_skip if large or clip_skip is None else clip_skip - 1
    makers: dict[str, Callable[[], list[Part]]] = {
        name: partial(_text_encoder, folder, name, _class(index, name), skip, large, loras)
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3")
        if _class(index, name) is not None
    }
    if _class(index, "vae") is not None:
        extra = find_extra_inputs(
            read_json(folder / "unet" / "config.json"), index.get("_class_name"), extra_inputs
        )
        scaled = all(each.name != IMAGE_LATENTS for each in extra)
        factor = UPSCALER_FACTOR if extra == KINDS["upscale"] else None
        makers["vae"] = partial(_autoencoder, folder / "vae", _class(index, "vae"), scaled, factor)
    for name, make in makers.items():
        try:
            parts += make()
        except ConfigError as error:
            refused[name] = str(error)
    return Parts(
        parts=tuple(_without_lone_encoders(parts, refused)),
        zeros_without_negative=large and bool(index.get("force_zeros_for_empty_prompt", True)),
        noise_levels=_noise_levels(folder, index),
        refused=refused,
    )


def _noise_levels(folder: Path, index: Mapping[str, Any]) -> tuple[float, ...]:
    """How an upscaler's small picture is noised; nothing for others."""
    import diffusers

    if _class(index, "low_res_scheduler") is None:
        return ()
    config = read_json(folder / "low_res_scheduler" / "scheduler_config.json")
    most = int(index.get("max_noise_level") or MOST_NOISE)
    levels = diffusers.DDPMScheduler.from_config(dict(config)).alphas_cumprod[: most + 1]
    return tuple(map(float, levels))


def _class(index: Mapping[str, Any], name: str) -> str | None:
    """The class of a pipeline's part; None where it has none."""
    entry = index.get(name)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def _without_lone_encoders(parts: list[Part], refused: Mapping[str, str]) -> list[Part]:
    """Without text encoders, where one of them is refused: a prompt needs them all."""
    if not any(name.startswith("text_encoder") for name in refused):
        return parts
    return [part for part in parts if part.role != "text_encoder"]


def _text_encoder(
    folder: Path,
    name: str,
    kind: str | None,
    skip: int | None,
    large: bool,
    loras: Sequence[Lora],
) -> list[Part]:
    """A CLIP text encoder with its tokenizer."""
    import transformers

    _require_class(kind, TEXT_ENCODERS)
    config = read_json(folder / name / "config.json")
    tokenizer, tokens = tokenizer_file(folder / name.replace("text_encoder", "tokenizer"))
    pooled = large and kind == "CLIPTextModelWithProjection"
    width, projected, layers = (
        _number(config, key, folder / name)
        for key in ("hidden_size", "projection_dim", "num_hidden_layers")
    )
    if skip is not None and not 0 <= skip < layers:
        raise ConfigError(f"Expected a clip_skip of 1 to {layers - 1} for {name}.")
    said = f"{kind} {skip} {large} {pooled}"
    adapters = adapters_of(loras, name, read_json(folder / "unet" / "config.json"))

    def load(dtype: torch.dtype) -> torch.nn.Module:
        encoder = getattr(transformers, str(kind))
        model = load_part(encoder, folder / name, dtype, spare=True, adapters=adapters)
        return ClipStates(model, skip=skip, pooled=pooled, normed=not large)

    outputs: dict[str, tuple[str | int, ...]] = {"states": ("batch", tokens, width)}
    if pooled:
        outputs["pooled"] = ("batch", projected)
    return [
        Part(
            name=name,
            role="text_encoder",
            sha256=_hash(merged_sha256(hash_part(folder / name), adapters), said, tokenizer),
            load=load,
            inputs={"input_ids": ("batch", tokens)},
            outputs=outputs,
            tokenizer=tokenizer,
        )
    ]


def _autoencoder(folder: Path, kind: str | None, scaled: bool, factor: float | None) -> list[Part]:
    """Decoder and encoder; a ``factor`` stands for the one that latents are scaled by."""
    import diffusers

    _require_class(kind, AUTOENCODERS)
    config = read_json(folder / "config.json")
    channels, sides = config.get("latent_channels"), config.get("block_out_channels")
    if kind == "AutoencoderTiny":
        channels, sides = channels or 4, config.get("encoder_block_out_channels")
    if not isinstance(channels, int) or not isinstance(sides, list) or not sides:
        raise ConfigError(
            f"Expected latent_channels and block_out_channels in {folder}/config.json. Fetch the "
            f"folder again."
        )
    sha256 = hash_part(folder)

    def load(dtype: torch.dtype) -> Any:
        vae = load_part(getattr(diffusers, str(kind)), folder, dtype)
        if factor is not None:
            vae.register_to_config(scaling_factor=factor)
        return vae

    return autoencoder_parts(
        load,
        sha256=sha256 if factor is None else _hash(sha256, str(factor)),
        channels=channels,
        factor=2 ** (len(sides) - 1),
        single=bool(config.get("force_upcast", kind == "AutoencoderKL")),
        scaled=scaled,
    )


def autoencoder_parts(
    load: Callable[[torch.dtype], Any],
    *,
    sha256: str,
    channels: int,
    factor: int,
    single: bool = False,
    scaled: bool = True,
) -> list[Part]:
    """Decoder and encoder of an autoencoder.

    Args:
        load: gives the autoencoder with weights of a dtype; its ``encode`` and ``decode`` are as
            diffusers' have them.
        sha256: of its config and weights.
        channels: C of the latents.
        factor: pixels a latent, along a side.
        single: whether it overflows in float16.
        scaled: whether the encoder scales as pipelines do; InstructPix2Pix's does not.
    """
    latents = ("batch", channels, "height", "width")
    image = ("batch", 3, f"{factor}*height", f"{factor}*width")
    decoder = Part(
        name="decoder",
        role="decoder",
        sha256=_hash(sha256, "decoder"),
        load=lambda dtype: Decoder(load(dtype)),
        inputs={"latents": latents},
        outputs={"image": image},
        single=single,
    )
    encoder = Part(
        name="encoder",
        role="encoder",
        sha256=_hash(sha256, "encoder" if scaled else "encoder, not scaled"),
        load=lambda dtype: Encoder(load(dtype), scaled=scaled),
        inputs={"image": image},
        outputs={"latents": latents},
        single=single,
    )
    return [decoder, encoder]


def _number(config: Mapping[str, Any], key: str, folder: Path) -> int:
    """A whole number of a config."""
    value = config.get(key)
    if not isinstance(value, int):
        raise ConfigError(
            f"Expected a number as {key!r} in {folder}/config.json, got {value!r}. Fetch the "
            f"folder again."
        )
    return value


def _require_class(kind: str | None, known: tuple[str, ...]) -> None:
    if kind not in known:
        raise ConfigError(f"Expected a {' or '.join(known)}, got a {kind}, which is not exported.")


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
