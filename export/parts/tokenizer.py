"""A model's tokenizer as one file that the library ``tokenizers`` reads without transformers."""

from __future__ import annotations

from pathlib import Path

from blockcache.runtime.errors import ConfigError


def tokenizer_file(folder: Path, tokens: int | None = None) -> tuple[str, int]:
    """The content of ``tokenizer.json``, and T: how many tokens a text becomes.

    Truncation and padding to T stand in the file, as the pipeline calls its tokenizer. A folder
    with a vocabulary and merges alone is converted.

    Args:
        folder: the tokenizer's own.
        tokens: T; default what the tokenizer says.

    Raises:
        ConfigError: no tokenizer there, one that has no such form, or one without a length.
    """
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, use_fast=True)
        backend = found.backend_tokenizer
    except Exception as error:  # transformers raises whatever its readers do with a file
        raise ConfigError(
            f"Expected a tokenizer in {folder} that the library tokenizers can run, got one that "
            f"does not load ({type(error).__name__}: {error}). Fetch the folder again."
        ) from error
    length = found.model_max_length if tokens is None else tokens
    if not 2 <= length < 4096:
        raise ConfigError(
            f"Expected a model_max_length of 2 to 4095 in {folder}/tokenizer_config.json, got "
            f"{length}."
        )
    backend.enable_truncation(length)
    backend.enable_padding(
        length=length, pad_id=found.pad_token_id, pad_token=found.pad_token, pad_type_id=0
    )
    return backend.to_str(), length
