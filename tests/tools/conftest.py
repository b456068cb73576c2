"""Bundles that hold other presets than those on disk."""

from __future__ import annotations

import dataclasses

import pytest


@pytest.fixture(scope="session")
def with_presets():
    """A function: the bundle as if it held the given presets alone."""

    def made(bundle, *presets):
        entry = next(iter(bundle.manifest.presets.values()))
        entries = {
            preset.name: dataclasses.replace(
                entry,
                steps=preset.schedule.steps,
                guidance_scale=preset.guidance_scale,
                solver=preset.solver,
                provenance=preset.provenance,
            )
            for preset in presets
        }
        return dataclasses.replace(
            bundle,
            manifest=dataclasses.replace(bundle.manifest, presets=entries),
            presets={preset.name: preset for preset in presets},
        )

    return made
