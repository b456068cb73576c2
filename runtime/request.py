"""The checked inputs of one request: shapes, dtypes, the two halves of guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from blockcache.runtime.bundle import Bundle
from blockcache.runtime.errors import InputError
from blockcache.runtime.plan import TensorSpec

SHARED_CONDITIONS = ("time_ids", "class_labels")
"""Conditions whose negative (unconditional) value is the positive one unless given."""


class Request:
    """The checked inputs of one call of ``denoise``."""

    def __init__(
        self,
        bundle: Bundle,
        noise: np.ndarray,
        guided: bool,
        first: int,
        steps: int,
        check_finite: bool,
    ) -> None:
        model = bundle.model
        self.check_finite = check_finite
        self._specs = model.conditions
        shape = np.shape(noise)
        if len(shape) != 4 or shape[1] != model.channels or shape[0] < 1:
            raise InputError(
                f"noise: expected [N, {model.channels}, height, width], got {list(shape)}. "
                f"session.noise(seeds) makes it."
            )
        if any(size < 1 or size % model.downsampling for size in shape[2:]):
            raise InputError(
                f"noise: expected a latent height and width divisible by {model.downsampling}, "
                f"got {shape[2]} x {shape[3]}. Choose the next multiples."
            )
        if not 0 <= first < steps:
            raise InputError(f"start_step: expected 0 to {steps - 1}, got {first}.")
        self.images, self.guided, self.first = shape[0], guided, first
        sizes = model.sizes.for_images(self.images, guided=guided)
        self.sizes = replace(sizes, height=shape[2], width=shape[3])
        self.noise = self.check("noise", noise, shape)

    def conditions(
        self, positive: Mapping[str, np.ndarray], negative: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Engine inputs [batch, ...]: with guidance the unconditional half comes first."""
        known = [spec.name for spec in self._specs]
        for name in (*positive, *negative):
            if name not in known:
                raise InputError(
                    f"{name}: this model takes the conditions {known} and no other. ControlNet "
                    f"residuals and adapters are not supported."
                )
        tokens = np.shape(positive["encoder_hidden_states"])
        if len(tokens) == 3:
            self.sizes = replace(self.sizes, tokens=tokens[1])
        inputs = {}
        for spec in self._specs:
            halves = [self._condition(spec, positive, "")]
            if self.guided:
                defaults = positive if spec.name in SHARED_CONDITIONS else {}
                halves.insert(0, self._condition(spec, {**defaults, **negative}, "negative "))
            inputs[spec.name] = np.concatenate(halves)
        return inputs

    def _condition(
        self, spec: TensorSpec, given: Mapping[str, np.ndarray], side: str
    ) -> np.ndarray:
        if spec.name not in given:
            raise InputError(
                f"{side}{spec.name}: expected a tensor, got none. Give it, or set "
                f"guidance_scale=1 to run without guidance."
                if side
                else f"{spec.name}: this model needs it in conditions={{...}}, got none."
            )
        shape = spec.shape(replace(self.sizes, batch=self.images))
        values = given[spec.name]
        if np.shape(values) == (1, *shape[1:]):
            values = np.broadcast_to(values, shape)
        return self.check(side + spec.name, values, shape, spec.dtype)

    def check(
        self, name: str, values: np.ndarray, shape: Sequence[int], dtype: str = "float32"
    ) -> np.ndarray:
        """The values, or InputError where shape, dtype or (if asked for) contents are wrong."""
        wanted = np.dtype(np.int64 if dtype == "int64" else np.float32)
        if not isinstance(values, np.ndarray) or values.dtype != wanted:
            got = values.dtype if isinstance(values, np.ndarray) else type(values).__name__
            raise InputError(
                f"{name}: expected a numpy array of {wanted}, got {got}. "
                f"Convert it with .astype(np.{wanted})."
            )
        if values.shape != tuple(shape):
            raise InputError(f"{name}: expected shape {list(shape)}, got {list(values.shape)}.")
        if self.check_finite:
            check_finite_values(name, values)
        return values


def check_finite_values(name: str, values: np.ndarray) -> None:
    """Raise InputError where there is NaN or infinity."""
    bad = int(values.size - np.isfinite(values).sum())
    if bad:
        raise InputError(
            f"{name}: expected finite numbers, got NaN or infinity in {bad} of {values.size}."
        )
