"""A bundle's latency by the roofline, and how far off it is where something was measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from blockcache.export import Processor, Timings
from blockcache.export.costs.costs import Costs
from blockcache.export.costs.roofline import segment_work
from blockcache.export.graph.work import Work
from blockcache.runtime import Bundle
from blockcache.runtime.errors import ConfigError
from blockcache.runtime.plan import Segment, Sizes


@dataclass(frozen=True)
class SegmentRow:
    """One segment of the prediction."""

    segment: Segment
    work: Work
    ms: float
    measured_ms: float | None

    @property
    def error(self) -> float | None:
        """Prediction over measurement, minus one."""
        return self.ms / self.measured_ms - 1 if self.measured_ms else None


@dataclass(frozen=True)
class PresetRow:
    """One preset of the prediction."""

    name: str
    steps: int
    computed_fraction: float  # of the blocks' predicted time
    image_ms: float  # the loop and its prompt segment, divided by the images of a batch
    speedup: float  # over the same steps with every block recomputed
    measured_ms: float | None  # by the measured segments


@dataclass(frozen=True)
class Estimate:
    """The roofline of a bundle on one processor."""

    bundle: Bundle
    processor: Processor
    images: int
    sizes: Sizes  # of the engines
    rows: tuple[SegmentRow, ...]  # all but the offline segment
    measured: Timings | None

    @property
    def timings(self) -> Timings:
        """The prediction in the form of a measurement."""
        times = {row.segment.name: row.ms for row in self.rows}
        return Timings("roofline", self.processor.name, self.sizes, times)

    @cached_property
    def costs(self) -> Costs:
        """Predicted times as a schedule pays them."""
        return self.timings.costs(self.bundle.segments)

    @property
    def step_ms(self) -> float:
        """One step that recomputes every block, the whole batch."""
        return self.costs.trunk + self.costs.every_block

    @property
    def block_share(self) -> float:
        """Share of the blocks in such a step."""
        return self.costs.every_block / self.step_ms

    @property
    def whole_ms(self) -> float | None:
        """One step of the uncut graph, nothing hoisted; None where the bundle has none."""
        return next((row.ms for row in self.rows if row.segment.role == "whole"), None)

    @property
    def step_error(self) -> float | None:
        """Predicted over measured step, minus one."""
        if self.measured is None:
            return None
        costs = self.measured.costs(self.bundle.segments)
        return self.step_ms / (costs.trunk + costs.every_block) - 1

    def presets(self) -> Iterator[PresetRow]:
        """Every preset of the bundle."""
        measured = self.measured.costs(self.bundle.segments) if self.measured else None
        for name in self.bundle.preset_names:
            preset = self.bundle.preset(name)
            schedule = preset.schedule
            yield PresetRow(
                name=name,
                steps=schedule.steps,
                computed_fraction=self.costs.blocks_share(schedule),
                image_ms=self.costs.image(schedule) / self.images,
                speedup=self.costs.speedup(schedule, preset.replaced_steps),
                measured_ms=measured.image(schedule) / self.images if measured else None,
            )


def estimate(
    bundle: Bundle,
    processor: Processor,
    *,
    images: int = 1,
    height: int | None = None,
    width: int | None = None,
    measured: Timings | None = None,
) -> Estimate:
    """Predict every segment of a bundle on a processor.

    Args:
        bundle: as compiled, of any precision.
        processor: a GPU (``export.roofline.gpu``) or this machine (``host.measure_host``).
        images: in one call; guidance doubles the engines' batch.
        height: of the latents; default the model's.
        width: of the latents.
        measured: to show the error beside; it must be of the same sizes.

    Raises:
        ConfigError: sizes that the model's downsampling does not divide; ``measured`` is of other
            sizes or of another model.
    """
    guided = any(entry.guidance_scale > 1 for entry in bundle.manifest.presets.values())
    usual = bundle.model.sizes.for_images(images, guided=guided)
    sizes = replace(
        usual,
        height=usual.height if height is None else height,
        width=usual.width if width is None else width,
    )
    if sizes.height % bundle.model.downsampling or sizes.width % bundle.model.downsampling:
        raise ConfigError(
            f"Expected a latent height and width divisible by {bundle.model.downsampling}, got "
            f"{sizes.height} x {sizes.width}. Choose the next multiples."
        )
    if measured is not None and measured.sizes != sizes:
        raise ConfigError(
            f"Expected timings at {sizes}, got some at {measured.sizes}. Choose --images, "
            f"--height and --width as they were measured."
        )
    if measured is not None:
        measured.costs(bundle.segments)  # refuses those of another model
    timed = [segment for segment in bundle.segments if segment.role != "time"]
    works = segment_work(timed, bundle.folder, processor, sizes)
    rows = tuple(
        SegmentRow(
            segment,
            work,
            processor.milliseconds(work),
            measured.segment_ms.get(segment.name) if measured else None,
        )
        for segment, work in zip(timed, works, strict=True)
    )
    return Estimate(bundle, processor, images, sizes, rows, measured)


def mean_error(rows: tuple[SegmentRow, ...]) -> float:
    """Mean of the segments' absolute relative errors, each weighed by its measured time."""
    seen = [(abs(row.error), row.measured_ms) for row in rows if row.error is not None]
    errors, weights = np.array(seen, np.float64).T
    return float(np.average(errors, weights=weights))
