"""Texts to token numbers, by the model's own ``tokenizer.json`` and the library ``tokenizers``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from blockcache.runtime.errors import BundleFormatError, MissingExtraError

_library: Any
try:
    import tokenizers as _library
except ImportError:  # the error comes where one is needed
    _library = None


@dataclass(frozen=True)
class Tokens:
    """One text as a text encoder reads it, in chunks of T tokens."""

    ids: np.ndarray  # int64 [chunks, T], each chunk with its own start, end and padding
    mask: np.ndarray  # int64 [chunks, T]: 1 for a token, 0 for padding
    late: tuple[str, ...]  # the texts of all chunks but the first


class TextTokenizer:
    """A text encoder's tokenizer.

    Args:
        name: the text encoder's, for errors.
        content: of ``tokenizer.json``; it says how texts are cut and padded to T tokens.
        tokens: T.

    Raises:
        MissingExtraError: the library is not installed.
        BundleFormatError: the file is no tokenizer, or one of another length.
    """

    def __init__(self, name: str, content: bytes, tokens: int) -> None:
        if _library is None:
            raise MissingExtraError.of("tokenizers", "pipeline", "Drawing from prompts")
        try:
            self._tokenizer = _library.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises plain Exception
            raise BundleFormatError(
                f"Expected a tokenizer.json for {name!r}, got a file that tokenizers cannot read: "
                f"{error}. Compile the model again."
            ) from error
        found = len(self._tokenizer.encode("").ids)
        if found != tokens:
            raise BundleFormatError(
                f"Expected a tokenizer that makes {tokens} tokens of a text for {name!r}, got one "
                f"that makes {found}. Compile the model again."
            )

    def __call__(self, text: str) -> Tokens:
        """All of a text: what does not fit into the first chunk follows in others."""
        first = self._tokenizer.encode(text)
        chunks = [first, *first.overflowing]
        return Tokens(
            ids=np.array([chunk.ids for chunk in chunks], np.int64),
            mask=np.array([chunk.attention_mask for chunk in chunks], np.int64),
            late=tuple(_text_of(chunk, text) for chunk in chunks[1:]),
        )


def _text_of(chunk: Any, text: str) -> str:
    """The piece of a text that a chunk holds."""
    marks = zip(chunk.offsets, chunk.special_tokens_mask, strict=True)
    spans = [span for span, special in marks if not special]
    return text[spans[0][0] : spans[-1][1]] if spans else ""
