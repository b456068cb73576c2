"""Prompts to what the U-Net attends to: tokenizers and text encoders, and a cache by text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from blockcache.runtime.errors import ConfigError
from blockcache.runtime.pipeline.bound_part import BoundPart
from blockcache.runtime.pipeline.tokenizer import TextTokenizer, Tokens
from blockcache.runtime.plan import ModelFacts

CACHED_TEXTS = 64
"""Texts whose states are kept; SDXL's take 0.6 MB each."""


@dataclass(frozen=True)
class Encoded:
    """What text encoders make of texts."""

    states: np.ndarray  # float32 [N, chunks * T, D]
    pooled: np.ndarray | None  # float32 [N, P], of models that take it
    late: tuple[str, ...]  # per text what fell away, "" where nothing did

    def zeros(self) -> Encoded:
        """Zeros in the place of the first text's states."""
        pooled = None if self.pooled is None else np.zeros_like(self.pooled[:1])
        return Encoded(np.zeros_like(self.states[:1]), pooled, ("",))


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
        self._encoders = tuple(encoders)
        self._tokenizers = tuple(
            TextTokenizer(
                encoder.part.name,
                tokenizers[encoder.part.name],
                int(encoder.part.inputs[0].dims[-1].coefficient),
            )
            for encoder in encoders
        )
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
        found = [self._one(text, chunks) for text in texts]
        pooled = [each.pooled for each in found if each.pooled is not None]
        return Encoded(
            np.concatenate([each.states for each in found]),
            np.concatenate(pooled) if pooled else None,
            tuple(late for each in found for late in each.late),
        )

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
        """One text by every encoder, chunk by chunk."""
        beside: list[np.ndarray] = []
        pooled: np.ndarray | None = None
        late = ""
        for encoder, tokenizer in zip(self._encoders, self._tokenizers, strict=True):
            tokens = tokenizer(text)
            late = late or "".join(tokens.late[chunks - 1 :])
            states = []
            for chunk in range(chunks):
                made = encoder(self._sizes, self._inputs(encoder, tokenizer, tokens, chunk))
                states.append(made["states"])
                if chunk == 0 and self.takes_pooled:
                    pooled = made.get("pooled", pooled)
            beside.append(np.concatenate(states, axis=1))
        return Encoded(np.concatenate(beside, axis=2), pooled, (late,))

    @staticmethod
    def _inputs(
        encoder: BoundPart, tokenizer: TextTokenizer, tokens: Tokens, chunk: int
    ) -> dict[str, np.ndarray]:
        """A chunk of a text; behind its end those of the empty text."""
        if chunk >= len(tokens.ids):
            tokens, chunk = tokenizer(""), 0
        given = {"input_ids": tokens.ids, "attention_mask": tokens.mask}
        return {spec.name: given[spec.name][chunk : chunk + 1] for spec in encoder.part.inputs}
