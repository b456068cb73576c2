"""Made-up presets, for models whose weights are random: nothing measured could choose one."""

from __future__ import annotations

import dataclasses

import numpy as np

from blockcache.export.bundle_writer import preset_entry, switch, write_preset
from blockcache.runtime import Alignment, Bundle, Preset, Provenance, Schedule
from blockcache.runtime.bundles.manifest import FileEntry

MADE_UP = "made-up"


def made_up(preset: Preset, seed: int = 0) -> Preset:
    """About half the blocks reused after the first step, under a random scale-shift."""
    rng = np.random.default_rng(seed)
    steps, blocks = preset.schedule.recompute.shape
    recompute = rng.permuted(np.arange(steps * blocks).reshape(steps, blocks) % 2 == 0, axis=1)
    recompute[0] = True
    tables = []
    for k, identity in enumerate(preset.alignment.tables):
        table = identity + rng.normal(0, 0.1, identity.shape).astype(np.float32)
        table[recompute[:, k]] = identity[recompute[:, k]]
        tables.append(table)
    return dataclasses.replace(
        preset,
        name=f"{preset.name}-{MADE_UP}",
        schedule=Schedule(recompute),
        alignment=Alignment(tuple(tables)),
        provenance=Provenance(kind=MADE_UP),
    )


def add_preset(bundle: Bundle, preset: Preset) -> Bundle:
    """The bundle with one preset more, on disk too."""
    file = write_preset(bundle.folder, preset)
    entry = preset_entry(file, preset, bundle.segments)
    manifest = dataclasses.replace(
        bundle.manifest,
        presets={**bundle.manifest.presets, preset.name: entry},
        files={**bundle.manifest.files, file: FileEntry.of(bundle.folder / file)},
    )
    switch(bundle.folder, manifest)
    return Bundle.open(bundle.folder, verify=False)
