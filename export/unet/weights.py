"""The weights of a model's part: which files are taken, that they are whole, and loading them.

A part is a folder as ``save_pretrained`` writes it. It holds ``config.json`` and the weights, often
in several variants ("fp16", "ema", ...), each in one file or in shards with an index. Names and
headers are checked first, so that most faults are named before gigabytes are loaded.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from blockcache.export.unet.configs import damaged, read_json
from blockcache.export.unet.lora import Adapter, merge
from blockcache.runtime.errors import ConfigError

PREFERRED = ("", "fp16", "bf16", "fp32")
"""Variants in the order in which they are taken; "" is the one without a name."""

_NAME = re.compile(
    r"(?:diffusion_pytorch_model|model)"  # as diffusers and transformers call them
    r"(?:\.(?P<variant>[^.-]+))?"
    r"(?P<shard>-\d+-of-\d+)?"
    r"(?:\.(?P<late>[^.-]+))?"  # older files name the variant behind the shard
    r"\.safetensors"
    r"(?P<index>\.index(?:\.(?P<of>[^.-]+))?\.json)?"
)
_FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names


@dataclass(frozen=True)
class WeightFiles:
    """The files of one variant; ``variant`` is what ``from_pretrained`` calls it."""

    variant: str | None
    files: tuple[str, ...]  # sorted names inside the part's folder
    index: str | None  # the name of the shards' index

    @property
    def names(self) -> tuple[str, ...]:
        """Every file: the index too, where there is one."""
        return self.files if self.index is None else (*self.files, self.index)


def choose(names: Iterable[str], where: object, variant: str | None = None) -> WeightFiles:
    """The weights to take among the files of a part, by their names alone.

    Args:
        names: of the files in the part's folder.
        where: the folder, for messages.
        variant: the one to take; default the first of ``PREFERRED`` that is there. Others, such as
            "ema" and "non_ema", are taken by name only.

    Raises:
        ConfigError: no such variant, no weights, or pickled ones only.
    """
    names = sorted(names)
    variants: dict[str, list[re.Match[str]]] = {}
    for match in filter(None, map(_NAME.fullmatch, names)):
        of = match["variant"] or match["late"] or match["of"] or ""
        variants.setdefault(of, []).append(match)
    if not variants:
        raise ConfigError(_no_weights(names, where))
    wanted = PREFERRED if variant is None else (variant,)
    taken = next((each for each in wanted if each in variants), None)
    if taken is None:
        asked = (
            "without a variant, or of fp16, bf16 or fp32," if variant is None else f"of {variant}"
        )
        raise ConfigError(
            f"Expected weights {asked} in {where}, found "
            f"{', '.join(sorted(each or 'some without a variant' for each in variants))}. Choose "
            f"one by name: --variant, or load_model(..., variant=...)."
        )
    index = next((match.string for match in variants[taken] if match["index"]), None)
    files = tuple(match.string for match in variants[taken] if not match["index"])
    if not files or (index is None and all(match["shard"] for match in variants[taken])):
        raise ConfigError(
            f"Expected shards and their index (*.safetensors.index.json) in {where}, found "
            f"{index or ', '.join(files)} only. Fetch the folder again."
        )
    return WeightFiles(taken or None, files, index)


def check_weights(folder: Path, variant: str | None = None) -> WeightFiles:
    """The weights to take in a local folder, found whole.

    Raises:
        ConfigError: as ``choose``; also a missing shard, a truncated file, a git-lfs pointer, an
            adapter (LoRA) that is not merged, numbers that are no plain floats.
    """
    chosen = choose([path.name for path in folder.iterdir()], folder, variant)
    files = set(chosen.files)
    expected = {} if chosen.index is None else _weight_map(folder / chosen.index)
    files |= set(expected.values())
    held = {name: _header(folder / name) for name in sorted(files)}
    for tensor, file in expected.items():
        if tensor not in held[file]:
            raise ConfigError(
                f"Expected the tensor {tensor!r} in {folder / file}, as {chosen.index} says, found "
                f"none. Fetch the folder again."
            )
    for name, tensors in held.items():
        _refuse_adapters(tensors, folder / name)
        _refuse_quantized(tensors, folder / name)
    return chosen


def _weight_map(path: Path) -> dict[str, str]:
    """Which shard holds a tensor, by the tensor's name, as the index says."""
    held = read_json(path).get("weight_map")
    if not isinstance(held, dict) or not all(
        isinstance(file, str) and _NAME.fullmatch(file) for file in held.values()
    ):
        raise ConfigError(
            f"Expected a weight_map of tensors to the files beside it in {path}, got something "
            f"else. Fetch the folder again."
        )
    return held


def load_part(
    kind: Any,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    spare: bool = False,
    adapters: Sequence[Adapter] = (),
) -> Any:
    """A part in ``dtype``, with every weight from its files.

    Args:
        kind: its class, of diffusers or transformers.
        folder: the part's own, as ``check_weights`` takes it.
        dtype: of the weights in memory.
        variant: as of ``choose``.
        spare: whether the files may hold tensors that the part does not have.
        adapters: of LoRA files, merged into the weights in float32.

    Raises:
        ConfigError: as ``check_weights``; also tensors that are missing, unknown or of another
            shape, a config that the class does not take, and a LoRA that does not fit.
    """
    chosen = check_weights(folder, variant)
    try:
        part, found = kind.from_pretrained(
            folder,
            variant=chosen.variant,
            torch_dtype=torch.float32 if adapters else dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported with the others, below
        )
    except Exception as error:  # a class raises whatever its constructor does with a config
        raise ConfigError(
            f"Expected a {kind.__name__} in {folder}, got one that does not load "
            f"({type(error).__name__}: {error}). Check its config.json."
        ) from error
    _refuse_incomplete(kind, folder, found, spare)
    merge(part, adapters)
    return torch.nn.Module.to(part, dtype) if adapters else part


def hash_part(folder: Path, variant: str | None = None) -> str:
    """The sha256 of a part's config and of the weights taken; other variants do not count."""
    digest = hashlib.sha256()
    for name in sorted(["config.json", *check_weights(folder, variant).names]):
        digest.update(name.encode())
        with (folder / name).open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def _refuse_incomplete(kind: Any, folder: Path, found: Mapping[str, Any], spare: bool) -> None:
    """Raise ConfigError where a tensor of the part got no weights, or weights were left over."""
    faults = []
    if found["missing_keys"]:
        faults.append(f"without {_some(found['missing_keys'])}")
    if found["unexpected_keys"] and not spare:
        faults.append(f"with {_some(found['unexpected_keys'])}, which it does not have")
    if found["mismatched_keys"]:
        name, got, wanted = min(found["mismatched_keys"])
        faults.append(f"with {name!r} of shape {list(got)} where it has {list(wanted)}")
    if faults:
        raise ConfigError(
            f"Expected the weights of the {kind.__name__} that {folder}/config.json describes, got "
            f"some {', and '.join(faults)}. Config and weights are of two models, or the folder is "
            f"not whole: fetch or save it again."
        )


def _some(names: Collection[str]) -> str:
    """The first three names, and how many more."""
    first = ", ".join(repr(name) for name in sorted(names)[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"


def _header(path: Path) -> dict[str, str]:
    """Names and dtypes of a file's tensors; ConfigError where the file is not whole."""
    if not path.is_file():
        raise ConfigError(
            f"Expected {path.name} in {path.parent}, found none: a shard, or the file behind a "
            f"link, is missing. Fetch the folder again."
        )
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from error


def _refuse_adapters(tensors: Collection[str], path: Path) -> None:
    adapters = [name for name in tensors if ".base_layer." in name or "lora_" in name]
    if adapters:
        raise ConfigError(
            f"Expected plain weights in {path}, got those of a LoRA that is not merged (such as "
            f"{adapters[0]!r}). Give the plain model and the LoRA's own file (--lora FILE), or "
            f"merge it and save again: pipeline.fuse_lora(); pipeline.unload_lora_weights(); "
            f"pipeline.save_pretrained(FOLDER)."
        )


def _refuse_quantized(tensors: Mapping[str, str], path: Path) -> None:
    # Integers that are no weights, such as position_ids of text encoders, are named so.
    odd = [n for n, dtype in tensors.items() if dtype not in _FLOATS and not n.endswith("_ids")]
    if odd:
        raise ConfigError(
            f"Expected weights in {' or '.join(_FLOATS)} in {path}, got {odd[0]!r} in "
            f"{tensors[odd[0]]}. Quantized models are not supported: give the original weights."
        )


def _no_weights(names: Iterable[str], where: object) -> str:
    names = list(names)
    single = next((name for name in names if name.endswith((".safetensors", ".ckpt"))), None)
    if single is not None:
        return (
            f"Expected diffusion_pytorch_model*.safetensors or model*.safetensors in {where}, "
            f"found the single-file checkpoint {single}. Convert it once, in Python: "
            f"StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER); for an XL "
            f"model with StableDiffusionXLPipeline. Then give the folder."
        )
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".bin.index.json"))]
    if not pickles:
        return (
            f"Expected diffusion_pytorch_model*.safetensors or model*.safetensors in {where}, "
            f"found none. Give a folder that save_pretrained wrote."
        )
    return (
        f"Expected safetensors in {where}, found the pickle {pickles[0]}. blockcache does not open "
        f"pickles, which can run code. Where you trust it, convert it once, in Python: "
        f"DiffusionPipeline.from_pretrained(SOURCE, use_safetensors=False).save_pretrained(FOLDER)."
    )
