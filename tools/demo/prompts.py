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
    "rocket",
    "house",
    "fox",
    "hamburger",
)
SHEET_CONCEPTS = (
    "red apple",
    "pig face",
    "grinning face",
    "rocket",
    "strawberry",
    "house",
    "panda",
    "tiger face",
    "christmas tree",
    "automobile",
    "fox",
    "hamburger",
)
EMPTY = ""  # the unconditional prompt of classifier-free guidance


def default_captions() -> list[str]:
    """Every concept in every style, concept by concept."""
    return [caption(style, words) for words in CONCEPTS for style in STYLES]
