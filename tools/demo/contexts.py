"""Token states of every training caption, encoded once."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blockcache.runtime.errors import ConfigError
from blockcache.runtime.files import replacing
from blockcache.tools.demo import text
from blockcache.tools.demo.data import Dataset

NAME = "contexts.safetensors"


def build(dataset: Dataset, work: Path) -> None:
    """Encode all captions and, last, the empty one."""
    states = text.encode([p.caption for p in dataset.pictures] + [""])
    with replacing(work / NAME) as file:
        save_file({"contexts": torch.from_numpy(states).half()}, file.name)


def load(work: Path) -> Tensor:
    """float16 [N + 1, 20, 384]; the last row is the empty caption.

    Raises:
        ConfigError: `build` has not run yet.
    """
    if not (work / NAME).exists():
        raise ConfigError(f"Expected {NAME} in {work}, found none. Run the command data first.")
    return load_file(work / NAME)["contexts"]
