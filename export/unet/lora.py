"""LoRA files, merged into the weights of a model's parts while these are loaded.

A merged model has the graphs of the plain one and other weights. So everything behind the loading
stays as it is, and engines of the plain model can be refitted. diffusers reads the files, in its
own naming and in kohya's; the weights are those that ``pipeline.fuse_lora`` gives, computed in
float64 and rounded once.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from blockcache.export.unet.configs import damaged
from blockcache.runtime.bundles.manifest import FileEntry
from blockcache.runtime.errors import ConfigError, MissingExtraError

PARTS = ("unet", "text_encoder", "text_encoder_2")
"""What a LoRA may change, as diffusers names the folders."""

_REFUSED = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "LoCon with a core",
}
"""In the names of tensors: other adapters, which are not W + scale * B A."""


@dataclass(frozen=True)
class Lora:
    """A LoRA file and how strongly it is merged."""

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Lora:
        """``FILE`` or ``FILE:SCALE``.

        Raises:
            ConfigError: no such file, or a scale that is not finite.

        Examples:
            >>> Lora.parse("style.safetensors:0.8").scale                    # doctest: +SKIP
            0.8
        """
        path, scale = text, "1"
        if not Path(text).is_file() and ":" in text:
            path, _, scale = text.rpartition(":")
        if not Path(path).is_file():
            raise ConfigError(
                f"Expected a LoRA file at {path}, found none. Give FILE or FILE:SCALE."
            )
        try:
            number = float(scale)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ConfigError(
                f"Expected a finite scale behind the colon of {text!r}, got {scale!r}. Give "
                f"FILE:SCALE, such as style.safetensors:0.8."
            )
        return cls(Path(path), number)

    @property
    def sha256(self) -> str:
        """Of the file."""
        return FileEntry.of(self.path).sha256


@dataclass(frozen=True)
class Adapter:
    """What a LoRA file holds for one part of a model."""

    lora: Lora
    part: str  # of ``PARTS``
    tensors: Mapping[str, torch.Tensor]  # named as diffusers names them, the part in front
    alphas: Mapping[str, float]  # kohya's, by diffusers' name of what they scale
    metadata: Mapping[str, Any]  # peft's config, {} where the file has none


def adapters_of(
    loras: Sequence[Lora], part: str, unet_config: Mapping[str, Any]
) -> tuple[Adapter, ...]:
    """What LoRA files hold for a part, in their order; files that leave it alone are left out.

    Args:
        loras: the files.
        part: of ``PARTS``.
        unet_config: the U-Net's config, by which kohya's names of SDXL's blocks are read.

    Raises:
        ConfigError: a file that is no LoRA of Stable Diffusion, or another kind of adapter.
        MissingExtraError: diffusers is not installed.
    """
    found = []
    for lora in loras:
        tensors, alphas, metadata = _read(lora.path, unet_config)
        own = {name: values for name, values in tensors.items() if _part(name) == part}
        scaled = {name: alpha for name, alpha in alphas.items() if _part(name) == part}
        config = {
            name.removeprefix(f"{part}."): value
            for name, value in metadata.items()
            if _part(name) == part
        }
        if own:
            found.append(Adapter(lora, part, own, scaled, config))
    return tuple(found)


def merged_sha256(plain: str, adapters: Sequence[Adapter]) -> str:
    """The hash of a part whose plain weights have the hash ``plain``."""
    if not adapters:
        return plain
    said = [plain, *(f"{adapter.lora.sha256} {adapter.lora.scale!r}" for adapter in adapters)]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()


def merge(module: torch.nn.Module, adapters: Sequence[Adapter]) -> None:
    """Add adapters to a part's weights.

    Args:
        module: the U-Net or text encoder, float32, so that nothing is rounded twice.
        adapters: of ``adapters_of``, for this part.

    Raises:
        ConfigError: tensors that do not fit the part, by name; nothing has been changed then by
            the adapter that holds them.
    """
    weights = dict(module.named_parameters())
    for adapter in adapters:
        for product in [*_products(adapter, weights)]:
            product.add(adapter.lora.scale)


def require_parts(loras: Sequence[Lora], folder: Path, unet_config: Mapping[str, Any]) -> None:
    """Raise ConfigError where a LoRA changes a part that the pipeline in ``folder`` lacks."""
    for lora in loras:
        tensors, _, _ = _read(lora.path, unet_config)
        for name in tensors:
            part = _part(name)
            if part != "unet" and not (folder / part).is_dir():
                raise ConfigError(
                    f"Expected a LoRA for the parts in {folder}, {lora.path} changes a {part} "
                    f"({name!r}), which is not there. Give a LoRA that was trained for this model."
                )


def _part(name: str) -> str:
    return name.split(".", 1)[0]


def _read(
    path: Path, unet_config: Mapping[str, Any]
) -> tuple[Mapping[str, torch.Tensor], Mapping[str, float], Mapping[str, Any]]:
    """Tensors by diffusers' names, kohya's alphas and peft's config of a file."""
    _check_names(path)
    try:
        from diffusers.configuration_utils import FrozenDict
        from diffusers.loaders import (
            StableDiffusionLoraLoaderMixin,
            StableDiffusionXLLoraLoaderMixin,
        )
    except ImportError as error:
        raise MissingExtraError.of("diffusers", "export", "Merging a LoRA") from error
    large = unet_config.get("addition_embed_type") == "text_time"
    reader = StableDiffusionXLLoraLoaderMixin if large else StableDiffusionLoraLoaderMixin
    try:
        tensors, alphas, metadata = reader.lora_state_dict(
            str(path.parent),
            weight_name=path.name,
            local_files_only=True,
            use_safetensors=True,  # alone: a pickle could run code
            unet_config=FrozenDict(unet_config) if large else None,
            return_lora_metadata=True,
        )
    except Exception as error:  # diffusers' converters raise whatever they come across
        raise ConfigError(
            f"Expected a LoRA of Stable Diffusion in {path}, got one that diffusers does not read: "
            f"{error}"
        ) from error
    strange = [name for name in tensors if _part(name) not in PARTS or "lora" not in name]
    if strange:
        raise ConfigError(
            f"Expected tensors of a LoRA for {', '.join(PARTS)} in {path}, got {strange[0]!r}. "
            f"Give a file that was trained for this model, as diffusers or kohya's scripts save it."
        )
    return tensors, alphas or {}, metadata or {}


def _check_names(path: Path) -> None:
    """Refuse what is no safetensors file, and adapters of another kind."""
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"Expected a LoRA as .safetensors, got {path}. blockcache does not open pickles, which "
            f"can run code."
        )
    try:
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from error
    for mark, kind in _REFUSED.items():
        named = next((name for name in names if mark in name), None)
        if named is not None:
            raise ConfigError(
                f"Expected a plain LoRA in {path}, got a {kind} ({named!r}), which is not merged "
                f"exactly. Merge it with the tool that made it, save the pipeline, compile that."
            )


def _products(adapter: Adapter, weights: Mapping[str, torch.Tensor]) -> Iterator[_Product]:
    """The adapter's pairs A, B, each with the weight that it changes; ConfigError for any other."""
    factors, alphas = _by_module(adapter, weights)
    for module, pair in factors.items():
        weight = weights.get(f"{module}.weight")
        if weight is None:
            raise _misfit(adapter, f"{module!r}, which the {adapter.part} does not have")
        if pair.keys() != {"A", "B"}:
            raise _misfit(adapter, f"lora_{min(pair)} without its other half for {module!r}")
        A, B = pair["A"], pair["B"]
        rank = A.shape[0]
        fits = A.shape[1:] == weight.shape[1:] and B.shape[0] == weight.shape[0]
        if not fits or B.flatten(1).shape[1] != rank:
            raise _misfit(
                adapter,
                f"A {list(A.shape)} and B {list(B.shape)} for {module!r}, whose weight has shape "
                f"{list(weight.shape)}",
            )
        alpha = alphas.pop(module) if module in alphas else _alpha(adapter, module, rank)
        yield _Product(weight, A, B, alpha)
    if alphas:
        raise _misfit(adapter, f"an alpha for {min(alphas)!r}, and no factors")


@dataclass(frozen=True)
class _Product:
    weight: torch.Tensor  # [out, in] or [out, in, kernel, kernel]
    A: torch.Tensor  # [rank, in, ...]
    B: torch.Tensor  # [out, rank, ...]
    alpha: float  # the product is scaled by alpha / rank

    def add(self, scale: float) -> None:
        """Change the weight: W + scale * alpha / rank * B A, rounded once."""
        product = self.B.double().flatten(1) @ self.A.double().flatten(1)
        change = (scale * self.alpha / self.A.shape[0]) * product.reshape(self.weight.shape)
        with torch.no_grad():
            self.weight.copy_(self.weight.double() + change)


def _by_module(
    adapter: Adapter, weights: Mapping[str, torch.Tensor]
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, float]]:
    """Factors and alphas by the module that they belong to, as the part names it."""
    own = {f"{adapter.part}.{name}" for name in weights}
    names = [*adapter.tensors, *map(_tensor_of, adapter.alphas)]
    renamed = _peft_names(names, adapter.part)
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for name, values in adapter.tensors.items():
        module, found, factor = _module(renamed[name], own).rpartition(".lora_")
        if not found or factor not in ("A.weight", "B.weight"):
            raise _misfit(adapter, f"{name!r}")
        factors.setdefault(module, {})[factor[0]] = values
    alphas = {
        _module(renamed[_tensor_of(name)], own).rpartition(".lora_")[0]: alpha
        for name, alpha in adapter.alphas.items()
    }
    return factors, alphas


def _peft_names(names: Sequence[str], part: str) -> dict[str, str]:
    """Names of tensors as peft has them: ``MODULE.lora_A.weight``, without the part in front."""
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    own = {name.removeprefix(f"{part}."): name for name in names}
    if not any("lora_A" in name for name in own):
        if part == "unet":
            own = convert_unet_state_dict_to_peft(own)
        else:
            own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
    return {name: renamed for renamed, name in own.items()}


def _tensor_of(alpha: str) -> str:
    """The name of a tensor that kohya's alpha of this name belongs to."""
    name = alpha.removesuffix(".alpha")
    return name if name.endswith(".weight") else f"{name}.lora.down.weight"


def _module(name: str, own: set[str]) -> str:
    """A name as transformers 5 has it, which has CLIP's layers a level higher than files have."""
    nested = any(".text_model." in each for each in own)
    return name if nested else name.removeprefix("text_model.")


def _alpha(adapter: Adapter, module: str, rank: int) -> float:
    """What peft's config says, as peft reads it; without one, the product is taken as it is."""
    config = adapter.metadata
    if not config:
        return float(rank)
    patterns = config.get("alpha_pattern") or {}
    match = next((key for key in patterns if re.fullmatch(rf"(.*\.)?({key})", module)), None)
    alpha = float(config["lora_alpha"] if match is None else patterns[match])
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _misfit(adapter: Adapter, what: str) -> ConfigError:
    return ConfigError(
        f"Expected a LoRA that fits the {adapter.part}, {adapter.lora.path} has {what}. Give one "
        f"that was trained for this model."
    )
