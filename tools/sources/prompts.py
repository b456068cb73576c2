"""The prompts that a model is measured and drawn with, as text and encoded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from blockcache.runtime.errors import ConfigError
from blockcache.tools.sources.codecs import DemoCodec
from blockcache.tools.sources.models import DEMO

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blockcache.export import Calibration, Lora


def calibration_for(
    model: str, file: Path | None, prompts: Path | None, loras: Sequence[Lora] = ()
) -> Calibration:
    """Encoded prompts from a file, from the demo model, or from the model's text encoders."""
    from blockcache.export.measure import calibration

    if file is not None:
        return calibration.read_calibration(file)
    texts = read_prompts(prompts) if prompts is not None else None
    if model == DEMO:
        from blockcache.tools.demo.model import default_prompts

        codec = DemoCodec()
        return calibration.Calibration(*codec.encode(texts or default_prompts()))
    return calibration.encode_prompts(model, texts or calibration.PROMPTS, loras)


def read_prompts(file: Path) -> list[str]:
    """The prompts of a file, one a line, empty lines left out."""
    if not file.is_file():
        raise ConfigError(f"Expected a file of prompts at {file}, found none.")
    lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"Expected one prompt a line in {file}, it has none.")
    return lines
