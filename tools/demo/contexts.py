"""Token states of every training caption, encoded once."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blockcache.tools.demo import text
from blockcache.tools.demo.data import Dataset

NAME = "contexts.safetensors"


def build(dataset: Dataset, work: Path) -> None:
    """Encode all captions and, last, the empty one."""
    states = text.encode([p.caption for p in dataset.pictures] + [""])
    temporary = work / f".{NAME}"
    save_file({"contexts": torch.from_numpy(states).half()}, temporary)
    temporary.replace(work / NAME)


def load(work: Path) -> Tensor:
    """float16 [N + 1, 20, 384]; the last row is the empty caption."""
    if not (work / NAME).exists():
        raise FileNotFoundError(f"expected {NAME} in {work}, found none: run `data` first")
    return load_file(work / NAME)["contexts"]
