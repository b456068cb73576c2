"""What a build made: time, size, kernels, fusions seen, and the split tax; as data and as a table.

Engines are judged by their layer lists: is every attention one kernel, is the scale-shift of a
reused block one kernel with its neighbours, and which kernels only copy a boundary tensor into
another layout? The split tax is the number of kernels of all segments of a denoising step over
that of the uncut model as one engine.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from blockcache.export.engines.log import Layer
from blockcache.runtime.engines.files import EngineEntry, EngineSet
from blockcache.runtime.plan import LOOP_ROLES, PART_ROLES, Segment, coefficient_names

_ATTENTION = re.compile(r"mha|fmha|flash_?attention", re.IGNORECASE)
_COPIES = re.compile(r"^__myl_(?:Tran|Resh|Move|Copy)+_|[Rr]eformat(?:ting)?")


@dataclass(frozen=True)
class Fusions:
    """What the layer list of one engine shows."""

    kernels: int
    counts: Mapping[str, int]
    copied: tuple[str, ...]  # boundary tensors that a kernel only copies to another layout


def fusion_facts(segment: Segment, layers: Sequence[Layer], attentions: int) -> Fusions:
    """Kernels of one engine, and what was fused in them.

    Args:
        segment: what was built.
        layers: the engine's layer list.
        attentions: attentions in the segment's graph (its Softmax nodes).
    """
    kernels = [layer for layer in layers if not layer.host]
    boundary = {t.name for t in (*segment.inputs, *segment.outputs)}
    touched = [
        boundary & {*layer.inputs, *layer.outputs}
        for layer in kernels
        if _COPIES.search(layer.name)
    ]
    aligned = [t.name for t in segment.inputs if t.name.startswith("scale_")]
    fused = [name for name in aligned if _is_one_kernel(name, kernels)]
    counts = {
        "attentions": attentions,
        "attentions_fused": sum(bool(_ATTENTION.search(layer.name)) for layer in kernels),
        "scale_shifts": len(aligned),
        "scale_shifts_fused": len(fused),
        "boundary_copies": sum(bool(names) for names in touched),
    }
    return Fusions(len(kernels), counts, tuple(sorted(set().union(*touched))))


def _is_one_kernel(scale: str, kernels: Sequence[Layer]) -> bool:
    """Whether one kernel reads the scale, the shift and the block's output."""
    k = int(scale.removeprefix("scale_"))
    wanted = {*coefficient_names(k, 1), f"block_{k}"}
    readers = [layer for layer in kernels if scale in layer.inputs]
    return len(readers) == 1 and wanted <= set(readers[0].inputs)


@dataclass(frozen=True)
class BuildReport:
    """The result of a build."""

    engines: EngineSet
    segments: tuple[Segment, ...]  # the ones built, in the bundle's order
    reused: frozenset[str]  # segments whose engine was there already
    seconds: float  # wall time of the whole build
    peak_rss_bytes: int  # most memory of one building process; 0 where nothing was built

    @property
    def entries(self) -> Mapping[str, EngineEntry]:
        """Engines by segment name."""
        return self.engines.engines

    @property
    def plan_bytes(self) -> int:
        """Size of all plans but the whole model's."""
        return sum(self.entries[s.name].bytes for s in self.segments if s.role != "whole")

    @property
    def step_kernels(self) -> int:
        """Kernels of one denoising step that recomputes every block."""
        return sum(
            self.entries[s.name].kernels
            for s in self.segments
            if s.role in LOOP_ROLES and s.role != "condition"
        )

    @property
    def whole_kernels(self) -> int:
        """Kernels of the uncut model; 0 where it was not built."""
        return sum(self.entries[s.name].kernels for s in self.segments if s.role == "whole")

    @property
    def split_tax(self) -> float | None:
        """Kernels of all segments over kernels of the uncut model."""
        return self.step_kernels / self.whole_kernels if self.whole_kernels else None

    def total(self, fact: str) -> int:
        """A fusion count over the segments of a step."""
        return sum(
            self.entries[s.name].facts.get(fact, 0)
            for s in self.segments
            if s.role not in ("whole", *PART_ROLES)
        )

    def copied(self) -> dict[str, int]:
        """Boundary tensors laid out anew, counted by kind: all of ``prompt_3`` count as prompt."""
        names = [name for s in self.segments if s.role != "whole" for name in self._copied(s)]
        return dict(Counter(re.sub(r"(_\d+)+$", "", name) for name in names).most_common())

    def _copied(self, segment: Segment) -> Sequence[str]:
        return self.entries[segment.name].copied

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "target": self.engines.target,
            "library": self.engines.library,
            "library_version": self.engines.version,
            "precision": self.engines.precision,
            "profiles": [str(profile) for profile in self.engines.profiles],
            "seconds": round(self.seconds, 2),
            "peak_rss_bytes": self.peak_rss_bytes,
            "plan_bytes": self.plan_bytes,
            "step_kernels": self.step_kernels,
            "whole_kernels": self.whole_kernels or None,
            "copied": self.copied(),
            "split_tax": self.split_tax and round(self.split_tax, 4),
            "engines": [self._row(segment) for segment in self.segments],
        }

    def _row(self, segment: Segment) -> dict[str, Any]:
        entry = self.entries[segment.name]
        return {
            "segment": segment.name,
            "role": segment.role,
            "seconds": round(entry.seconds, 3),
            "bytes": entry.bytes,
            "kernels": entry.kernels,
            "scratch_bytes": entry.scratch_bytes,
            "reused": segment.name in self.reused,
            **entry.facts,
            "copied": list(entry.copied),
        }


def report_table(report: BuildReport) -> Table:
    """The report as a table for the terminal."""
    engines = report.engines
    table = Table(
        title=f"{engines.target}: {engines.library} {engines.version}, {engines.precision}",
        caption=_caption(report),
        caption_justify="left",
        box=None,
    )
    table.add_column("segment")
    for column in ("s", "MB", "kernels", "attention", "scale-shift", "copies"):
        table.add_column(column, justify="right")
    for segment in report.segments:
        entry = report.entries[segment.name]
        facts = entry.facts
        table.add_row(
            segment.name,
            "kept" if segment.name in report.reused else f"{entry.seconds:.1f}",
            f"{entry.bytes / 1e6:.1f}",
            str(entry.kernels),
            _of(facts.get("attentions_fused", 0), facts.get("attentions", 0)),
            _of(facts.get("scale_shifts_fused", 0), facts.get("scale_shifts", 0)),
            str(facts.get("boundary_copies", 0) or ""),
        )
    return table


def _of(part: int, whole: int) -> str:
    return f"{part}/{whole}" if whole else ""


def _caption(report: BuildReport) -> str:
    lines = [
        f"{len(report.segments)} engines, {report.plan_bytes / 1e6:.0f} MB, "
        f"{report.seconds:.1f} s, peak memory {report.peak_rss_bytes / 1e9:.1f} GB; "
        + "; ".join(str(profile) for profile in report.engines.profiles),
        f"kernels a step: {report.step_kernels}; attention fused "
        f"{_of(report.total('attentions_fused'), report.total('attentions'))}, scale-shift fused "
        f"{_of(report.total('scale_shifts_fused'), report.total('scale_shifts'))}",
        f"boundary copies {report.total('boundary_copies')}, of tensors: "
        + (", ".join(f"{kind} {count}" for kind, count in report.copied().items()) or "none"),
    ]
    if report.split_tax is not None:
        lines.append(
            f"split tax: {report.step_kernels} kernels against {report.whole_kernels} of the uncut "
            f"model: {report.split_tax:.3f}"
        )
    return "\n".join(lines)
