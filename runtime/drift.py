"""The drift monitor: does live traffic still change as the profile said it would?

::

    monitor = DriftMonitor(on_drift=lambda report: alert(str(report)))
    session = Session.open("bundle", preset="dpm-20-d0.5", drift=monitor)
    ...
    monitor.report()                # at any time

A schedule reuses a block while its *accumulated* change, by the profile, stays within delta
(eq. 7). The monitor checks that premise where it costs no extra run: when a block is recomputed, it
measures eq. 6 between the new output and the one that was in use until then.

The two outputs mostly lie several steps apart (at delta = 0.5 nearly always). So the measured
change is compared with the profile's change summed over the steps in between, as eq. 7 sums it. One
step apart, the two are the same quantity. Over more steps the sum is an upper bound, because
changes may cancel (triangle inequality, as far as outputs keep their norm). So only outputs one
step apart can be reported for too low a change. The bound is close: on the demo model with its
calibration prompts, a measured change is 0.91 of the sum on average, 0.63 to 1.10 over steps and
blocks.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.change_meter import previous_steps
from blockcache.runtime.errors import BundleFormatError, ConfigError
from blockcache.runtime.plan import Preset


@dataclass(frozen=True)
class Band:
    """Where the change of a recomputed block should lie, NaN where none is measured."""

    low: np.ndarray  # float64 [S, K]
    high: np.ndarray  # float64 [S, K]

    @classmethod
    def of(
        cls, mean: np.ndarray, std: np.ndarray, recompute: np.ndarray, deviations: float
    ) -> Band:
        """The band around the profile's change, summed from the output before to the new one.

        ``mean`` and ``std`` are the profile's, float [S, K].
        """
        before = previous_steps(recompute)
        rows, columns = np.nonzero(recompute & (before >= 0))
        since = before[rows, columns]
        totals = np.cumsum(mean + deviations * std, axis=0, dtype=np.float64)
        low, high = np.full((2, *mean.shape), np.nan)
        high[rows, columns] = totals[rows, columns] - totals[since, columns]
        lowest = np.maximum(mean - deviations * std, 0.0)[rows, columns]
        low[rows, columns] = np.where(rows - since == 1, lowest, 0.0)
        return cls(low, high)


@dataclass(frozen=True)
class Excess:
    """One step and block whose change has left its band."""

    step: int
    block: int
    change: float  # mean over the window
    low: float
    high: float

    def __str__(self) -> str:
        return (
            f"step {self.step} block {self.block}: change {self.change:.3f}, "
            f"calibrated {self.low:.3f} to {self.high:.3f}"
        )


@dataclass(frozen=True)
class DriftReport:
    """What a monitor has seen."""

    preset: str
    images: int  # measured so far
    judged: int  # steps and blocks with a full window, of ``measured``
    measured: int  # steps and blocks that the schedule lets a monitor measure
    change: np.ndarray  # float64 [S, K], mean over the window, NaN where nothing was measured
    outside: tuple[Excess, ...]  # the farthest from its band first

    @property
    def drifted(self) -> bool:
        """Whether anything is outside its band."""
        return bool(self.outside)

    def __str__(self) -> str:
        seen = f"{self.judged} pairs of step and block after {self.images} images"
        if not self.outside:
            return f"preset {self.preset}: no alarm on {seen}"
        worst = "; ".join(str(excess) for excess in self.outside[:3])
        return (
            f"preset {self.preset}: {len(self.outside)} of {seen} have left their calibrated band: "
            f"{worst}"
        )


def log_drift(report: DriftReport) -> None:
    """The default of ``on_drift``: a warning in the log "blockcache"."""
    logging.getLogger("blockcache").warning("Drift: %s. Profile the model again.", report)


class DriftMonitor:
    """Compares the change of live traffic with the profile of the preset.

    Thread-safe; sessions of one preset may share a monitor. To watch a part of the traffic only,
    send it to a second session: engines are shared. A session with a monitor holds a second buffer
    for every block and reads both once more where a block is recomputed; one without pays nothing.
    """

    def __init__(
        self,
        *,
        window: int = 32,
        deviations: float = 1.5,
        on_drift: Callable[[DriftReport], None] = log_drift,
    ) -> None:
        """Choose how much must differ, and who hears of it.

        Args:
            window: images that a mean is taken over; nothing is judged on fewer.
            deviations: half the band's width, in the profile's standard deviations over images.
            on_drift: called with a report when a first mean leaves its band; called again only
                after all means had returned to theirs.

        Raises:
            ConfigError: a window below 1 or a negative width.
        """
        if window < 1 or not deviations >= 0:
            raise ConfigError(
                f"Expected a window of 1 image or more and deviations of 0 or more, got {window} "
                f"and {deviations}."
            )
        self._window, self._deviations, self._on_drift = window, deviations, on_drift
        self._lock = threading.Lock()
        self._preset: tuple[str, str, bytes] | None = None
        self._drifted = False

    def watch(self, bundle: Bundle, preset: Preset) -> None:
        """Take the preset's profile as the measure; a session calls it when it opens.

        Raises:
            ConfigError: the preset has no profile, one of a single image, or the monitor watches
                another preset.
            BundleFormatError: the profile does not fit the preset.
        """
        recompute = preset.schedule.recompute
        key = (bundle.model.sha256, preset.name, recompute.tobytes())
        with self._lock:
            if self._preset is None:
                mean, std = read_profile(bundle, preset)
                self._band = Band.of(mean, std, recompute, self._deviations)
                self._recent = np.full((self._window, *mean.shape), np.nan)
                self._counts = np.zeros(mean.shape, np.int64)
                self._images = 0
                self._preset = key
            elif self._preset != key:
                raise ConfigError(
                    f"Expected sessions of one preset, {self._preset[1]!r}, got one of "
                    f"{preset.name!r}. Make a monitor for each preset."
                )

    def add(self, change: np.ndarray) -> None:
        """Take in a request's change, float [S, K, N], NaN where it was not measured.

        A session calls it after each request. Where an output had NaN or infinity, the change is
        infinity.
        """
        with self._lock:
            for image in np.moveaxis(change, 2, 0):
                rows, columns = np.nonzero(~np.isnan(image))
                place = self._counts[rows, columns] % self._window
                self._recent[place, rows, columns] = image[rows, columns]
                self._counts[rows, columns] += 1
            self._images += change.shape[2]
            report = self._report()
            begins, self._drifted = report.drifted and not self._drifted, report.drifted
        if begins:
            self._on_drift(report)

    def report(self) -> DriftReport:
        """The means over the window so far, and which of them are outside their band.

        Raises:
            ConfigError: no session was opened with this monitor.
        """
        if self._preset is None:
            raise ConfigError("Expected a monitor in use: open a session with drift=monitor first.")
        with self._lock:
            return self._report()

    def _report(self) -> DriftReport:
        filled = np.minimum(self._counts, self._window)
        present = np.arange(self._window)[:, None, None] < filled
        total = np.where(present, self._recent, 0.0).sum(axis=0)
        mean = np.where(filled > 0, total / np.maximum(filled, 1), np.nan)
        judged = self._counts >= self._window
        distance = np.maximum(self._band.low - mean, mean - self._band.high)
        rows, columns = np.nonzero(judged & (distance > 0))
        order = np.argsort(-distance[rows, columns], kind="stable")
        assert self._preset is not None
        return DriftReport(
            preset=self._preset[1],
            images=self._images,
            judged=int(judged.sum()),
            measured=int(np.isfinite(self._band.high).sum()),
            change=mean,
            outside=tuple(
                Excess(s, k, float(mean[s, k]), self._band.low[s, k], self._band.high[s, k])
                for s, k in zip(rows[order].tolist(), columns[order].tolist(), strict=True)
            ),
        )


def read_profile(bundle: Bundle, preset: Preset) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over images of the change, float32 [S, K] each.

    Raises:
        ConfigError: the preset has no profile, or one of a single image.
        BundleFormatError: the profile does not fit the preset.
    """
    name, images = preset.provenance.profile, preset.provenance.images or 0
    if name is None:
        raise ConfigError(
            f"Expected a preset with a measured schedule, {preset.name!r} has no profile to "
            f"compare with. Choose one that was compiled with a delta."
        )
    if images < 2:
        raise ConfigError(
            f"Expected a profile of 2 images or more, that of preset {preset.name!r} has {images} "
            f"and so no spread. Compile again with more calibration prompts."
        )
    if name not in bundle.manifest.files:
        raise BundleFormatError(
            f"Preset {preset.name!r} names the profile {name!r}, the manifest has no such file. "
            f"Compile again."
        )
    tensors = bundle.tensors(name)
    branches = sum(block.cut is not None for block in bundle.model.blocks)
    wanted = (preset.schedule.steps, preset.schedule.blocks - branches)
    shapes = {key: values.shape for key, values in tensors.items()}
    if shapes.get("mean") != wanted or shapes.get("std") != wanted:
        raise BundleFormatError(
            f"{name}: expected mean and std of shape {list(wanted)}, got {shapes}. Compile again."
        )
    unmeasured = ((0, 0), (0, branches))  # nobody measures the change of whole branches
    return np.pad(tensors["mean"], unmeasured), np.pad(tensors["std"], unmeasured)
