"""What a request gives a bundle's ControlNets, checked, as the session's conditions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from blockcache.runtime.errors import InputError
from blockcache.runtime.pipeline.pictures import as_pictures
from blockcache.runtime.plan import ModelFacts, control_names, controlnet_count
from blockcache.runtime.session import Session


@dataclass(frozen=True, eq=False)
class ControlArguments:
    """Per ControlNet its pictures, and how strongly and at which shares of the steps it acts."""

    pictures: tuple[np.ndarray, ...]  # uint8 [N or 1, H, W, 3]
    scales: tuple[Any, ...]
    starts: tuple[Any, ...]
    ends: tuple[Any, ...]

    @classmethod
    def of(
        cls, model: ModelFacts, image: Any, scale: object, start: object, end: object
    ) -> ControlArguments:
        """The arguments of ``Pipeline.__call__``.

        Raises:
            InputError: pictures where the bundle has no ControlNet, none where it has one, or not
                one of each for every ControlNet.
        """
        count = controlnet_count(model)
        several = count > 1 and isinstance(image, Sequence)
        given = () if image is None else tuple(image) if several else (image,)
        if len(given) != count:
            raise InputError(
                f"control_image: expected pictures for each of the {count} ControlNets that this "
                f"bundle was compiled with, got {len(given)}."
                if count
                else f"control_image: expected none, {model.name!r} was compiled without a "
                f"ControlNet. Compile it with one: --controlnet FOLDER."
            )
        return cls(
            tuple(as_pictures(each, "control_image") for each in given),
            _one_each("controlnet_conditioning_scale", scale, count),
            _one_each("control_guidance_start", start, count),
            _one_each("control_guidance_end", end, count),
        )

    @property
    def counts(self) -> dict[str, int]:
        """How many pictures there are, for ``common_count``."""
        return {
            control_names(index)[0]: len(pictures) for index, pictures in enumerate(self.pictures)
        }

    def conditions(self, session: Session, first: int) -> dict[str, np.ndarray]:
        """By name; ``first`` is the first step that is executed.

        Raises:
            InputError: scales or shares out of range.
        """
        found = {}
        for index, pictures in enumerate(self.pictures):
            image, scale = control_names(index)
            found[image] = pictures.transpose(0, 3, 1, 2).astype(np.float32) / 255
            found[scale] = session.control_scale(
                self.scales[index], self.starts[index], self.ends[index], start_step=first
            )
        return found


def _one_each(name: str, given: object, count: int) -> tuple[Any, ...]:
    """One value for every ControlNet; a single one serves all."""
    values = tuple(given) if isinstance(given, Sequence) else (given,) * count
    if len(values) != count:
        raise InputError(f"{name}: expected one number, or {count} of them, got {len(values)}.")
    return values
