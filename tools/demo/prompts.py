"""The prompts whose token states ship with the model, and those of the contact sheet."""

from __future__ import annotations

from blockcache.tools.demo.concepts import caption

STYLES = ("twitter", "noto", "flat")
CONCEPTS = (
    "red heart",
    "blue heart",
    "red apple",
    "strawberry",
    "grinning face",
    "pig face",
    "panda",
    "full moon",
    "basketball",
    "blue book",
    "deciduous tree",
    "christmas tree",
)
SHEET_CONCEPTS = (
    "red heart",
    "blue heart",
    "red apple",
    "pig face",
    "tiger face",
    "grinning face",
    "slightly smiling face",
    "full moon",
    "basketball",
    "deciduous tree",
    "blue book",
    "fire",
)
EMPTY = ""  # the unconditional prompt of classifier-free guidance


def default_captions() -> list[str]:
    """Every concept in every style, concept by concept."""
    return [caption(style, words) for words in CONCEPTS for style in STYLES]
