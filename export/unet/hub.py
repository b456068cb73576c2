"""The local folder of a model: the one given, or a snapshot of what is needed from the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from blockcache.runtime.errors import ConfigError

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_CONFIGS = ("model_index.json", "config.json", "scheduler_config.json", "tokenizer_config.json")


def local_folder(
    source: str | Path, parts: Sequence[str] = ("unet",), variant: str | None = None
) -> Path:
    """The folder of a pipeline or of a bare U-Net; ``unet/`` inside a pipeline stands for it.

    Args:
        source: a folder, or a hub id such as "owner/model".
        parts: folders whose weights are needed: "unet", "vae", "text_encoder". A name stands for
            numbered ones too, such as text_encoder_2. The configs of all parts are fetched.
        variant: of the U-Net's weights, as ``choose`` has it.

    Raises:
        ConfigError: no such folder, a single file, or a hub that cannot give the files.
    """
    check_name(source)
    folder = Path(source)
    if folder.is_dir():
        parent = folder.resolve().parent
        inside = folder.resolve().name == "unet" and (
            (parent / "model_index.json").is_file() or (parent / "scheduler").is_dir()
        )
        return parent if inside else folder
    return _fetch(str(source), parts, variant)


def check_name(source: str | Path) -> None:
    """Raise ConfigError unless ``source`` is a folder or reads as a hub id; nothing is fetched."""
    if Path(source).is_file():
        raise ConfigError(single_file(Path(source)))
    if not Path(source).is_dir() and not _HUB_ID.fullmatch(str(source)):
        raise ConfigError(
            f"Expected a diffusers folder or a hub id such as 'owner/model', got {str(source)!r}; "
            f"no folder of that name exists."
        )


def model_name(source: str | Path) -> str:
    """What to call a model: its folder's name, or the hub's for a snapshot in the hub's cache."""
    folder = Path(source).resolve()
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.split("--")[-1]
    return folder.name


def needed_files(
    names: Sequence[str], parts: Sequence[str], where: object, variant: str | None = None
) -> list[str]:
    """The files to fetch among those of a hub repository: configs, and one variant of each part.

    A repository without ``unet/`` is a bare U-Net, whose files lie at the top.
    """
    from blockcache.export.unet.weights import choose  # imports torch; names are checked without

    folders: dict[str, list[str]] = {}
    for path in map(PurePosixPath, names):
        folders.setdefault(str(path.parent), []).append(path.name)
    needed = [name for name in names if PurePosixPath(name).name in _CONFIGS]
    for folder, files in folders.items():
        part = re.sub(r"_\d+$", "", folder)
        if part == "." and "unet" not in folders:
            part = "unet"
        if part == "tokenizer" and "text_encoder" in parts:
            needed += [f"{folder}/{file}" for file in files]
        elif part in parts:
            of = variant if part == "unet" else None
            chosen = choose(files, where if folder == "." else f"{where}/{folder}", of)
            needed += [str(PurePosixPath(folder) / file) for file in chosen.names]
    return sorted(set(needed))


def _fetch(source: str, parts: Sequence[str], variant: str | None) -> Path:
    """A snapshot in the hub's cache; without a network, the one that is there already."""
    import huggingface_hub

    try:
        listed = huggingface_hub.model_info(source).siblings or []
    except Exception as error:  # network, authorisation and naming errors share no base class
        try:
            return Path(huggingface_hub.snapshot_download(source, local_files_only=True))
        except Exception:  # nothing in the cache: the first reason is the one to tell
            raise _unreachable(source, error) from error
    files = needed_files([file.rfilename for file in listed], parts, source, variant)
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=files))
    except Exception as error:
        raise _unreachable(source, error) from error


def _unreachable(source: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"{source!r} is no local folder and could not be fetched from the hub: {error}. "
        f"Give the path of a folder that save_pretrained wrote."
    )


def single_file(path: Path) -> str:
    """What to do with a file in the place of a folder."""
    if path.name.startswith("diffusion_pytorch_model"):
        return f"Expected a diffusers folder, got the file {path}. Give the folder it lies in."
    if path.suffix not in (".safetensors", ".ckpt"):
        return f"Expected a diffusers folder or a hub id, got the file {path}."
    return (
        f"Expected a diffusers folder or a hub id, got the single-file checkpoint {path}. Convert "
        f"it once, in Python:\n"
        f"    from diffusers import StableDiffusionPipeline  # XL: StableDiffusionXLPipeline\n"
        f"    pipeline = StableDiffusionPipeline.from_single_file({str(path)!r})\n"
        f"    pipeline.save_pretrained({str(path.with_suffix(''))!r})\n"
        f"Then give the folder {path.with_suffix('')}."
    )
