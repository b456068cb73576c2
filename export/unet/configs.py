"""The JSON files of a model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from blockcache.runtime.errors import ConfigError

_POINTER = b"version https://git-lfs"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none. ConfigError where it is broken."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no UTF-8, or no JSON
        raise ConfigError(
            f"Expected JSON in {path}, got: {error}. {pointer_or(path, 'Fetch the file again.')}"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"Expected a JSON object in {path}, got {type(content).__name__}. Fetch the file again."
        )
    return content


def pointer_or(path: Path, advice: str) -> str:
    """What to do about a file that cannot be read: git-lfs may have left a pointer in its place."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) != _POINTER:
            return advice
    return "It is a git-lfs pointer, not the file itself: run 'git lfs pull' in the folder."


def damaged(path: Path, error: Exception) -> ConfigError:
    """The error for a safetensors file that cannot be read."""
    advice = pointer_or(path, "It is truncated or damaged: fetch it again.")
    return ConfigError(
        f"Expected a whole safetensors file at {path}, got one that cannot be read ({error}). "
        f"{advice}"
    )
