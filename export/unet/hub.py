"""The local folder of a model: the one given, or a snapshot from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from blockcache.runtime.errors import ConfigError


def local_folder(source: str | Path) -> Path:
    """A local folder as it is; a hub id through huggingface_hub's cache."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists() or str(source).count("/") != 1:
        raise ConfigError(
            f"Expected a diffusers folder or a hub id such as 'owner/model', got {source!r}; "
            f"no folder of that name exists."
        )
    from huggingface_hub import snapshot_download

    try:
        wanted = ["unet/*", "scheduler/*", "tokenizer/tokenizer_config.json", "model_index.json"]
        return Path(snapshot_download(str(source), allow_patterns=wanted))
    except Exception as error:  # network, authorisation and naming errors share no base class
        raise ConfigError(
            f"{source!r} is no local folder and could not be fetched from the hub: {error}. "
            f"Give the path of a folder that save_pretrained wrote."
        ) from error
