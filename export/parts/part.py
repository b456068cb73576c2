"""One model of a pipeline beside its U-Net, described before it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from blockcache.runtime.plan import Role


@dataclass(frozen=True, kw_only=True)
class Part:
    """A text encoder, a decoder or an encoder; ``PipelineFacts`` says what each reads and writes.

    Shapes are written as ``Dim`` reads them.
    """

    name: str  # unique in the pipeline: text_encoder, text_encoder_2, decoder, encoder
    role: Role
    sha256: str  # of everything that its graph depends on
    load: Callable[[torch.dtype], torch.nn.Module]  # weights of a dtype; ``forward`` is the graph
    inputs: Mapping[str, tuple[str | int, ...]]
    outputs: Mapping[str, tuple[str | int, ...]]
    tokenizer: str = ""  # of a text encoder: the content of tokenizer.json
    single: bool = False  # whether it overflows in float16, and stays float32 there


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a pipeline that can be exported, and why the others cannot."""

    parts: tuple[Part, ...]
    zeros_without_negative: bool = False  # as in ``PipelineFacts``
    noise_levels: tuple[float, ...] = ()  # as in ``PipelineFacts``
    refused: Mapping[str, str] = field(default_factory=dict)  # a part's name -> why

    @property
    def names(self) -> tuple[str, ...]:
        """Of all parts, in their order."""
        return tuple(part.name for part in self.parts)
