"""What a reader needs to place figures: machine, versions, commit, how steady the clocks were."""

from __future__ import annotations

import csv
import io
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    *("blockcache", "numpy", "onnxruntime", "onnxruntime-gpu", "torch", "diffusers", "DeepCache"),
    *("tensorrt", "tensorrt-rtx", "cuda-bindings"),
)
_GPU_FIELDS = ("name", "driver_version", "memory.total", "power.limit")
_CLOCK_FIELDS = (
    *("clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw"),
    "clocks_event_reasons.active",
)


def machine_facts() -> dict[str, str]:
    """Processor, GPU and driver, versions, and the commit of this source tree."""
    facts = {"cpu": cpu_name(), "python": platform.python_version(), "commit": _commit()}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    return facts | nvidia_smi(_GPU_FIELDS)


def cpu_name() -> str:
    """Model and count of the processors that this process may use."""
    names = [
        line.split(":")[1].strip()
        for line in _lines(Path("/proc/cpuinfo"))
        if line.startswith("model name")
    ]
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.machine()} x {count}"


def nvidia_smi(fields: tuple[str, ...]) -> dict[str, str]:
    """A query of the first GPU; {} where there is none."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", "0"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if made.returncode:
        return {}
    (row,) = list(csv.reader(io.StringIO(made.stdout), skipinitialspace=True))[:1] or [[]]
    return dict(zip(fields, row, strict=False))


@dataclass
class Steadiness:
    """Sampled between rounds: did something else run, or did the clocks fall?"""

    samples: list[dict[str, str]] = field(default_factory=list)

    def sample(self) -> None:
        """Load of the last minute, share of time stolen from this machine, GPU clocks."""
        load = _lines(Path("/proc/loadavg"))
        stat = _lines(Path("/proc/stat"))
        found = {"load": load[0].split()[0]} if load else {}
        if stat and len(stat[0].split()) > 8:
            found["steal_ticks"] = stat[0].split()[8]
        self.samples.append(found | nvidia_smi(_CLOCK_FIELDS))

    def notes(self) -> dict[str, str]:
        """Per sampled figure its range; of throttling, every reason seen (0x0: none)."""
        found: dict[str, str] = {}
        for name in self.samples[0] if self.samples else ():
            values = [sample.get(name, "") for sample in self.samples]
            if name == "clocks_event_reasons.active":
                found[name] = " ".join(sorted(set(values)))
            elif name == "steal_ticks":
                found[name] = str(int(values[-1]) - int(values[0]))
            else:
                ordered = sorted(values, key=_number)
                found[name] = f"{ordered[0]} to {ordered[-1]}"
        return found


def _number(text: str) -> float:
    try:
        return float(text.split()[0])
    except (ValueError, IndexError):
        return 0.0


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _commit() -> str:
    """Short hash of the tree that this file belongs to, + where it has changes; "" elsewhere."""
    where = Path(__file__).resolve().parent
    command = ["git", "-C", str(where), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        made = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except OSError:
        return ""
    return made.stdout.strip() if made.returncode == 0 else ""
