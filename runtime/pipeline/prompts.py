"""Prompts to what the U-Net attends to: tokenizers and text encoders, and a cache by text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from blockcache.runtime.devices.device import Device
from blockcache.runtime.devices.tensor import Tensor, Window, item_bytes
from blockcache.runtime.errors import ConfigError
from blockcache.runtime.pipeline.bound_part import BoundPart
from blockcache.runtime.pipeline.tokenizer import TextTokenizer, Tokens
from blockcache.runtime.plan import ModelFacts

CACHED_TEXTS = 64
"""Texts whose states are kept; SDXL's take 0.6 MB each."""


@dataclass(frozen=True)
class Encoded:
    """What text encoders make of texts, where they ran and in the dtype that they write."""

    states: Tensor  # [N, chunks * T, D]
    pooled: Tensor | None  # [N, P], of models that take it
    late: tuple[str, ...]  # per text what fell away, "" where nothing did


class PromptEncoder:
    """All text encoders of a pipeline.

    Texts are encoded one at a time: a text's states do not depend on those beside it, one shape
    is enough, and a service meets the same texts again.

    Args:
        model: what the U-Net takes.
        encoders: in the order in which their states stand side by side.
        tokenizers: by an encoder's name: the content of its tokenizer.json.

    Raises:
        ConfigError: the U-Net takes a pooled text, and no encoder gives one.
        BundleFormatError, MissingExtraError: see ``TextTokenizer``.
    """

    def __init__(
        self, model: ModelFacts, encoders: Sequence[BoundPart], tokenizers: Mapping[str, bytes]
    ) -> None:
        self._sizes = replace(model.sizes, batch=1)
        self._device = encoders[0].device
        self._encoders = tuple(encoders)
        self._tokenizers = tuple(
            TextTokenizer(
                encoder.part.name,
                tokenizers[encoder.part.name],
                int(encoder.part.inputs[0].dims[-1].coefficient),
            )
            for encoder in encoders
        )
        states = next(s for s in encoders[0].part.outputs if s.name == "states")
        self.tokens = int(states.dims[1].coefficient)
        """Of a text in one chunk; a U-Net takes others, too."""
        self._cache: dict[str, Encoded] = {}
        self.takes_pooled = any(spec.name == "text_embeds" for spec in model.conditions)
        outputs = {spec.name for encoder in encoders for spec in encoder.part.outputs}
        if self.takes_pooled and "pooled" not in outputs:
            raise ConfigError(
                "Expected a text encoder with a pooled output, as the U-Net's text_embeds, the "
                "bundle has none. Use Session, with text_embeds of your own."
            )

    def __call__(self, texts: Sequence[str], *, chunks: int = 1) -> Encoded:
        """Encode texts, each as so many chunks; what is longer falls away and is named."""
        with self._device.session_lock():
            found = [self._one(text, chunks) for text in texts]
            pooled = [each.pooled for each in found if each.pooled is not None]
            return Encoded(
                self._side_by_side([each.states for each in found]),
                self._side_by_side(pooled) if pooled else None,
                tuple(late for each in found for late in each.late),
            )

    def zeros(self, like: Encoded) -> Encoded:
        """Zeros in the place of one text's states."""
        with self._device.session_lock():
            tensors = [
                tensor and _new(self._device, (1, *tensor.shape[1:]), tensor.dtype)
                for tensor in (like.states, like.pooled)
            ]
        assert tensors[0] is not None
        return Encoded(tensors[0], tensors[1], ("",))

    def lent(self, tensor: Tensor) -> Any:
        """A tensor of ``Encoded`` as a session takes it: on a GPU where it lies, complete."""
        view = self._device.view(tensor)
        if view is not None:
            return view
        assert tensor.array is not None
        return tensor.array.astype(np.float32, copy=False)

    def _side_by_side(self, rows: Sequence[Tensor]) -> Tensor:
        """Tensors [1, ...] as one, [N, ...]."""
        if len(rows) == 1:
            return rows[0]
        made = _new(self._device, (len(rows), *rows[0].shape[1:]), rows[0].dtype)
        for place, row in enumerate(rows):
            self._device.copy(made.along(place, 1).window(), row.window())
        return made

    def chunks(self, texts: Sequence[str]) -> int:
        """How many chunks the longest text has."""
        return max(len(each(text).ids) for text in texts for each in self._tokenizers)

    def _one(self, text: str, chunks: int) -> Encoded:
        """One text's states, from the cache where it is there."""
        key = f"{chunks} {text}"
        encoded = self._cache.pop(key, None)
        if encoded is None:
            while len(self._cache) >= CACHED_TEXTS:
                del self._cache[next(iter(self._cache))]  # the one unused for longest
            encoded = self._encode(text, chunks)
        self._cache[key] = encoded
        return encoded

    def _encode(self, text: str, chunks: int) -> Encoded:
        """One text by every encoder, chunk by chunk: their states side by side."""
        specs = [next(s for s in e.part.outputs if s.name == "states") for e in self._encoders]
        length = int(specs[0].dims[1].coefficient)
        ends = np.cumsum([0, *(int(spec.dims[2].coefficient) for spec in specs)]).tolist()
        states = _new(self._device, (1, chunks * length, ends[-1]), specs[0].dtype)
        pooled: Tensor | None = None
        late = ""
        for encoder, tokenizer, *columns in zip(
            self._encoders, self._tokenizers, ends, ends[1:], strict=False
        ):
            tokens = tokenizer(text)
            late = late or "".join(tokens.late[chunks - 1 :])
            for chunk in range(chunks):
                made = encoder.run(self._sizes, self._inputs(encoder, tokenizer, tokens, chunk))
                rows = slice(chunk * length, (chunk + 1) * length)
                place = states.window(rows, slice(*columns))
                self._device.copy(place, made["states"].window())
                if chunk == 0 and self.takes_pooled and "pooled" in made:
                    pooled = _new(self._device, made["pooled"].shape, made["pooled"].dtype)
                    self._device.copy(pooled.window(), made["pooled"].window())
        return Encoded(states, pooled, (late,))

    @staticmethod
    def _inputs(
        encoder: BoundPart, tokenizer: TextTokenizer, tokens: Tokens, chunk: int
    ) -> dict[str, np.ndarray | Window]:
        """A chunk of a text; behind its end those of the empty text."""
        if chunk >= len(tokens.ids):
            tokens, chunk = tokenizer(""), 0
        given = {"input_ids": tokens.ids, "attention_mask": tokens.mask}
        return {spec.name: given[spec.name][chunk : chunk + 1] for spec in encoder.part.inputs}


def _new(device: Device, shape: tuple[int, ...], dtype: str) -> Tensor:
    """A tensor of zeros in memory of its own."""
    return device.tensor(device.allocate(math.prod(shape) * item_bytes(dtype)), 0, shape, dtype)
