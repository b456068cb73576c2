"""Everything that needs a GPU, in one command and under ten minutes, without a network.

    python tools/bench/gpu.py collect WHEELS     with a network: what the other machine lacks
    python tools/bench/gpu.py run WHEELS OUT     with a GPU and PyTorch: every figure into OUT

``collect`` builds blockcache's own wheel (with the CUDA kernels, where there is nvcc) and fetches
the rest for this Python. ``run`` installs what is in WHEELS beside the machine's PyTorch, then
goes part by part: a part that fails or runs out of time is noted and the next one begins, so that
paid minutes are never lost. OUT/summary.md says what came of each; standard library only.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUDGET_S = 590.0
PACKAGES = (
    *("numpy", "safetensors", "onnx", "onnx-ir", "onnxscript", "ml-dtypes", "diffusers"),
    *("accelerate", "transformers", "filelock", "rich", "typer", "matplotlib", "pillow"),
    *("onnxruntime-gpu", "cuda-bindings", "tensorrt-rtx", "polygraphy", "DeepCache"),
    *("pytest", "pytest-timeout", "hypothesis"),
)
"""Besides blockcache itself; PyTorch must be there already."""


@dataclass(frozen=True)
class Part:
    """One command of the run, from the repository's root."""

    name: str  # its output is OUT/<name>.log
    limit_s: float
    command: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of a part."""

    name: str
    seconds: float
    result: str  # "done", "failed (1)", "out of time", "no time left"


def parts(out: Path, work: Path, gpu: str) -> list[Part]:
    """What is run, most wanted first: the demo's whole table, then SD1.5 size, then the rest.

    Args:
        out: figures.
        work: bundles, too large to keep.
        gpu: its name in ``blockcache estimate``; "" where it has no data sheet there.
    """
    tests = ("-m", "pytest", "-q", "-m", "gpu", "tests/gpu", "tests/kernels")
    kernels = ("-m", "blockcache.tools.bench.kernels", "--json", f"{out}/kernels.json")
    return [
        *_demo(out, work / "demo", gpu),
        Part("pytest-gpu", 120, ("python", *tests)),
        Part("kernels", 60, ("python", *kernels)),
        *_sd15(out, work / "sd15", gpu),
    ]


def _demo(out: Path, bundle: Path, gpu: str) -> list[Part]:
    presets = [f"dpm:{text}" for text in ("20:0.5", "50:0.5", "20", "50", "14")]
    options = [word for preset in presets for word in ("--preset", preset)]
    compiled = ("compile", "demo", str(bundle), "--precision", "bfloat16", *options)
    few = ("--profile-prompts", "8", "--profile-seeds", "1")
    return [
        _blockcache("demo-compile", 90, *compiled, *few),
        *_measured("demo", out, bundle, gpu, ("--model", "demo", "--rounds", "9")),
    ]


def _sd15(out: Path, bundle: Path, gpu: str) -> list[Part]:
    scale = ("-m", "blockcache.tools.bench.scale", str(bundle), "--precision", "bfloat16")
    figures = ("--steps", "20", "--figures", f"{out}/scale-sd15.json")
    rounds = ("--model", "sd15", "--rounds", "5")
    return [
        Part("sd15-compile", 120, ("python", *scale, *figures)),
        *_measured("sd15", out, bundle, gpu, rounds),
    ]


def _measured(name: str, out: Path, bundle: Path, gpu: str, bench: tuple[str, ...]) -> list[Part]:
    """Build, check, time and predict one bundle."""
    folder, timings = out / f"{name}-bench", out / f"{name}-timings.json"
    engines = ("--target", "current", "--whole", "--jobs", "4", "--memory-gb", "40")
    written = ("--out", str(folder), "--timings", str(timings), "--append", f"{out}/history.jsonl")
    found = [
        _blockcache(f"{name}-build", 90, "build", str(bundle), *engines),
        _blockcache(f"{name}-check", 60, "check", str(bundle), "--json"),
        _blockcache(f"{name}-bench", 150, "bench", str(bundle), *bench, *written),
    ]
    if gpu:
        beside = ("--gpu", gpu, "--timings", str(timings))
        found.append(_blockcache(f"{name}-estimate", 30, "estimate", str(bundle), *beside))
    return found


def _blockcache(name: str, limit_s: float, *arguments: str) -> Part:
    return Part(name, limit_s, ("python", "-m", "blockcache.tools.cli", *arguments))


def run_parts(
    wanted: Sequence[Part],
    out: Path,
    python: str,
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Run each part within its limit and what is left of the budget; never stops at a failure."""
    end = clock() + budget_s
    outcomes = []
    for part in wanted:
        begin = clock()
        left = min(part.limit_s, end - begin)
        result = _run(part, out, python, left) if left > 1 else "no time left"
        outcomes.append(Outcome(part.name, clock() - begin, result))
        print(f"{part.name}: {result}, {outcomes[-1].seconds:.0f} s", flush=True)
    return outcomes


def _run(part: Part, out: Path, python: str, limit_s: float) -> str:
    command = [python if word == "python" else word for word in part.command]
    with (out / f"{part.name}.log").open("w") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        try:
            made = subprocess.run(
                command, cwd=ROOT, stdout=log, stderr=log, timeout=limit_s, check=False
            )
        except subprocess.TimeoutExpired:
            return "out of time"
        except OSError as error:
            log.write(f"{error}\n")
            return "failed (no such program)"
    return "done" if made.returncode == 0 else f"failed ({made.returncode})"


def summary(outcomes: Sequence[Outcome], machine: str, out: Path) -> str:
    """What ran, then every report that was written, as one Markdown page."""
    rows = [f"| {o.name} | {o.result} | {o.seconds:.0f} |" for o in outcomes]
    total = sum(o.seconds for o in outcomes)
    head = ["# GPU run", "", machine.strip(), "", "| part | result | s |", "|---|---|---:|", *rows]
    pages = [f"{path.read_text().strip()}" for path in sorted(out.glob("*-bench/report.md"))]
    pages += [path.read_text() for path in sorted(out.glob("*-estimate.log"))]
    return "\n".join([*head, f"| all | | {total:.0f} |", "", "\n\n".join(pages)]) + "\n"


def gpu_name(text: str) -> str:
    """The name of ``nvidia-smi``'s GPU among the estimate's data sheets; "" for others.

    Examples:
        >>> gpu_name("NVIDIA A100-SXM4-80GB, 550.54, 81920 MiB")
        'a100'
        >>> gpu_name("NVIDIA GeForce RTX 4090, 550.54, 24564 MiB")
        'rtx4090'
    """
    known = r"b200|h200|h100|a100|a30|a40|a10|l40s|l40|l4|t4|rtx ?(?:3090|4090|5090)"
    found = re.search(rf"\b({known})\b", text.split(",")[0], re.IGNORECASE)
    return found.group(1).lower().replace(" ", "") if found else ""


def collect(wheels: Path) -> int:
    """Build blockcache's wheel and fetch the others; what a registry lacks is left out."""
    wheels.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip"]
    code = subprocess.run([*pip, "wheel", "--no-deps", "-w", wheels, ROOT], check=False).returncode
    for package in PACKAGES:
        made = subprocess.run([*pip, "download", "-q", "-d", wheels, package], check=False)
        if made.returncode:
            print(f"left out: {package}", file=sys.stderr)
    # The other machine has a PyTorch that fits its driver.
    for pattern in ("torch-*", "nvidia_*", "triton-*"):
        for wheel in wheels.glob(pattern):
            wheel.unlink()
    return code


def install(wheels: Path, environment: Path) -> str:
    """An environment over the machine's own packages; returns its Python."""
    subprocess.run(
        [sys.executable, "-m", "venv", "--system-site-packages", environment], check=True
    )
    python = str(environment / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(wheels)]
    for package in PACKAGES:  # one by one: a missing engine library must not stop the others
        subprocess.run([*pip, package], check=False)
    subprocess.run([*pip, "--no-deps", "--force-reinstall", "blockcache"], check=True)
    return python


def run(wheels: Path, out: Path) -> int:
    """Install, run every part, write the summary; 1 where a part was not done."""
    begin = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    work = out / "work"
    machine = ""
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit"
        asked = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True
        )
        machine = asked.stdout
    python = install(wheels, work / "venv")
    os.environ["HF_HUB_OFFLINE"] = "1"
    left = BUDGET_S - (time.monotonic() - begin)
    outcomes = run_parts(parts(out, work, gpu_name(machine)), out, python, left)
    (out / "summary.md").write_text(summary(outcomes, machine or "no GPU", out))
    shutil.rmtree(work, ignore_errors=True)  # gigabytes of weights and engines
    return int(any(outcome.result != "done" for outcome in outcomes))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("collect", "run"):
        command = commands.add_parser(name)
        command.add_argument("wheels", type=Path, help="folder of wheels")
        if name == "run":
            command.add_argument("out", type=Path, help="folder for the results")
    options = parser.parse_args()
    if options.command == "collect":
        return collect(options.wheels)
    return run(options.wheels.resolve(), options.out.resolve())


if __name__ == "__main__":
    sys.exit(main())
