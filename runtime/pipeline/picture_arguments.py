"""What is asked for a picture, checked: texts, seeds, sizes in pixels, strength, tiles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from blockcache.runtime.arguments import finite_number, whole_number
from blockcache.runtime.errors import InputError
from blockcache.runtime.plan import MOST_SIZE, ModelFacts

Size: TypeAlias = tuple[int, int]


def texts_of(name: str, given: object) -> list[str]:
    """One text or several, as a list; InputError for anything else."""
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{name}: expected a text or a list of texts, got {str(given)[:80]!r}.")
    if not texts:
        raise InputError(f"{name}: expected at least one text, got an empty list.")
    return list(texts)


def common_count(counts: Mapping[str, int]) -> int:
    """N, of arguments that come once or N times."""
    several = {count for count in counts.values() if count != 1}
    if len(several) > 1 or 0 in several:
        told = ", ".join(f"{count} {name}" for name, count in counts.items() if count != 1)
        raise InputError(f"Expected one of each or as many, got {told}.")
    return max(counts.values())


def whole_seeds(seeds: object) -> tuple[int, ...]:
    """Seeds as they are given, checked."""
    if isinstance(seeds, str) or not isinstance(seeds, Iterable):
        raise InputError(f"seeds: expected a list of whole numbers, got {seeds!r}.")
    return tuple(whole_number("seeds", seed, 0) for seed in seeds)


def random_seeds(count: int) -> tuple[int, ...]:
    """Seeds that nobody chose; the result tells them."""
    return tuple(int(seed) for seed in np.random.SeedSequence().generate_state(count))


def latent_size(
    model: ModelFacts,
    factor: int,
    given: Size | None,
    height: int | None,
    width: int | None,
) -> Size:
    """Latent height and width of a request.

    Args:
        model: whose own size is the default.
        factor: pixels a latent, along a side.
        given: height and width in pixels of what a picture that is given leads to.
        height: in pixels.
        width: in pixels.

    Raises:
        InputError: not the size of the images, or no multiple of what the U-Net takes.
    """
    own = (model.sizes.height, model.sizes.width)
    sides = []
    for name, asked, there, default in zip(
        ("height", "width"), (height, width), given or (None, None), own, strict=True
    ):
        side = asked if asked is not None else there
        if side is None:
            sides.append(default)
            continue
        pixels = whole_number(name, side, 1, MOST_SIZE * factor)
        if there is not None and pixels != there:
            raise InputError(
                f"{name}: expected {there}, by the size of the image, got {pixels}. Resize the "
                f"image first, or leave {name} out."
            )
        multiple = factor * model.downsampling
        if pixels % multiple:
            near = max(multiple, round(pixels / multiple) * multiple)
            raise InputError(
                f"{name}: expected a multiple of {multiple} pixels, got {pixels}. Take {near}."
            )
        sides.append(pixels // factor)
    return sides[0], sides[1]


def first_step(steps: int, strength: object) -> int:
    """Where image to image begins in a preset of so many steps, as diffusers counts."""
    share = finite_number("strength", strength)
    run = min(int(steps * share), steps)
    if not 0 < share <= 1 or run < 1:
        raise InputError(
            f"strength: expected more than {1 / steps:.3g}, which is one of {steps} steps, to "
            f"1, got {strength}."
        )
    return steps - run


def tile_side(factor: int, tile: int) -> int:
    """A tile's side in latents, of its side in pixels."""
    pixels = whole_number("tile", tile, 1)
    if pixels % factor or pixels < 4 * factor:
        raise InputError(
            f"tile: expected a multiple of {factor} pixels, {4 * factor} or more, got {pixels}."
        )
    return pixels // factor


def micro_sizes(
    pixels: Size, original_size: Size | None, crops_coords_top_left: Size, target_size: Size | None
) -> tuple[int, ...]:
    """SDXL's six numbers; where none are given, those of a picture of its own size, ``pixels``.

    Raises:
        InputError: one of them is no pair of whole numbers.
    """
    return (
        *_pair("original_size", pixels if original_size is None else original_size, 1),
        *_pair("crops_coords_top_left", crops_coords_top_left, 0),
        *_pair("target_size", pixels if target_size is None else target_size, 1),
    )


def _pair(name: str, given: object, least: int) -> Size:
    if not isinstance(given, list | tuple) or len(given) != 2:
        raise InputError(f"{name}: expected two whole numbers of pixels, got {str(given)[:80]}.")
    first, second = (whole_number(name, side, least) for side in given)
    return first, second
