"""Files of encoded prompts: what calibration measures with and ``blockcache run`` draws.

Imports no torch, so that bundles run where none is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import numpy as np

from blockcache.runtime.bundles.tensor_files import read_tensors
from blockcache.runtime.errors import ConfigError

NEGATIVE = "negative."
"""Prefix of the unconditional prompt's tensors."""

Conditions: TypeAlias = dict[str, np.ndarray]


def read_encoded_prompts(path: Path) -> tuple[Conditions, Conditions]:
    """Read a safetensors file of a model's conditions; ``negative.NAME`` is the unconditional NAME.

    Returns:
        The prompts' conditions by name, [P or 1, ...], and the unconditional ones, [P or 1, ...].

    Raises:
        ConfigError: no such file, or one without the text encoder's output, without a prompt, or
            with numbers that are not finite.
    """
    if not path.is_file():
        raise ConfigError(f"Expected a calibration file at {path}, found none.")
    tensors = read_tensors(path)
    for name, values in tensors.items():
        if values.shape[:1] in ((), (0,)):
            raise ConfigError(
                f"Expected {name} of one prompt or more in {path}, got the shape "
                f"{list(values.shape)}. Encode the prompts again."
            )
        if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
            raise ConfigError(
                f"Expected finite numbers as {name} in {path}, got NaN or infinity. Encode the "
                f"prompts again, in float32."
            )
    positive = {name: values for name, values in tensors.items() if not name.startswith(NEGATIVE)}
    negative = {
        name.removeprefix(NEGATIVE): values
        for name, values in tensors.items()
        if name.startswith(NEGATIVE)
    }
    if "encoder_hidden_states" not in positive or "encoder_hidden_states" not in negative:
        raise ConfigError(
            f"Expected the tensors encoder_hidden_states [P, tokens, D] and "
            f"negative.encoder_hidden_states [1, tokens, D] in {path}, got {sorted(tensors)}."
        )
    return positive, negative
