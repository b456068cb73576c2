"""Time and peak memory of every stage of long work."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Stage:
    """What one stage took."""

    name: str
    seconds: float
    peak_bytes: int  # most memory of this process while it ran


@dataclass
class StageMeter:
    """Time and peak memory, stage by stage; the peak starts anew with each (Linux)."""

    stages: list[Stage] = field(default_factory=list)
    _name: str = ""
    _begin: float = 0.0

    def enter(self, name: str) -> None:
        """End the stage that runs, if one does, and begin ``name``; "" begins none."""
        now = time.perf_counter()
        if self._name:
            self.stages.append(Stage(self._name, now - self._begin, peak_bytes()))
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        self._name, self._begin = name, time.perf_counter()

    def observe(self, stage: str, done: int, total: int) -> None:
        """An observer for ``compile_model``: its stages, the export's part by part."""
        from blockcache.export.graph.to_onnx import EXPORT_PARTS

        if stage == "export":
            stage = (*EXPORT_PARTS, "")[done]
        if stage and stage != self._name:
            self.enter(stage)


def peak_bytes() -> int:
    """Most memory of this process since the peak was last forgotten."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0
