"""Everything that needs a GPU, in one command, on a machine without a network.

    python tools/bench/gpu.py kit KIT     here, with nvcc 13: all that the other machine lacks
    python KIT/gpu.py run KIT OUT         there, with a GPU: OUT/report.md and report.json
    python KIT/gpu.py run KIT OUT --stand-in LIBRARY      a dry run on the tests' CUDA driver

Stage 1 needs Python 3.12, torch, numpy, cuda-bindings and onnxruntime; stage 2 runs where TensorRT
or onnxruntime-gpu is installed. A part that fails or runs out of time is noted and the next one
begins. Standard library only, but for ``kit``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

BUDGET_S = 570.0
MOST_BYTES = 60_000_000
"""Of a kit."""

PACKAGES = (
    *("safetensors", "onnx==1.18.0", "protobuf", "typing-extensions"),
    *("pytest", "pluggy", "iniconfig", "packaging", "pygments", "hypothesis", "sortedcontainers"),
)
"""Besides blockcache itself; what the other machine has already is not used."""

WHEELS_FOR = ("--python-version", "3.12", "--only-binary", ":all:", "--no-deps")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
TESTS = ("conftest.py", "cuda_driver", "golden/tensorrt_api.json", "gpu", "kernels")
KERNEL_TESTS = ("-m", "pytest", "-q", "-m", "gpu", "tests/kernels/test_cuda_kernels.py")


@dataclass(frozen=True)
class Part:
    """One command of the run, from the kit's folder."""

    name: str  # its output is OUT/<name>.log
    limit_s: float
    command: tuple[str, ...]
    left_out: str = ""  # why it is not run


@dataclass(frozen=True)
class Outcome:
    """What came of a part."""

    name: str
    seconds: float
    result: str  # "done", "failed (1)", "out of time", "no time left", "left out: ..."


# -- what is run -----------------------------------------------------------------------------------


def first_stage(out: Path, bundles: Path, stand_in: bool) -> list[Part]:
    """Kernels, the runtime's tests and its figures, with PyTorch for an engine library."""
    no_kernels = "the stand-in runs no CUDA kernel" if stand_in else ""
    no_sanitizer = "" if shutil.which("compute-sanitizer") else "no compute-sanitizer on PATH"
    sanitizer = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", "python")
    kernels = ("python", "-m", "blockcache.tools.bench.kernels", "--json", f"{out}/kernels.json")
    folder = "tests/cuda_driver"
    marked = ("python", "-m", "pytest", "-q", "-rs", "-m", "driver" if stand_in else "gpu")
    patience = 2 if stand_in else 1  # a dry run may have a busy CPU
    folders = [str(bundles / name) for name in ("sd-2", "demo")]
    figures = ("python", "-m", "blockcache.tools.bench.gpu_figures", *folders)
    return [
        Part("kernels-tests", 120, ("python", *KERNEL_TESTS), no_kernels),
        Part("kernels-sanitizer", 150, (*sanitizer, *KERNEL_TESTS), no_kernels or no_sanitizer),
        Part("kernels-times", 90, kernels, no_kernels),
        Part("engine-tests", 240 * patience, (*marked, f"{folder}/test_torch_engine.py")),
        Part(
            "figures",
            240 * patience,
            (*marked, f"{folder}/test_gpu_figures.py")
            if stand_in
            else (*figures, "--json", f"{out}/figures.json"),
        ),
    ]


def second_stage(out: Path, bundles: Path, has: Callable[[str], bool]) -> list[Part]:
    """Engines of the demo model, built, checked and timed; ``has`` tells what is installed."""
    bundle, cli = str(bundles / "demo"), ("python", "-m", "blockcache.tools.cli")
    names = ("tensorrt", "tensorrt_rtx")
    no_trt = "" if any(map(has, names)) else "neither tensorrt nor tensorrt_rtx is installed"
    no_ort = "" if has("onnxruntime.capi.onnxruntime_providers_cuda") else "no onnxruntime-gpu"
    bench = ("--rounds", "7", "--engine")
    build = (*cli, "build", bundle, "--target", "current", "--whole", "--jobs", "4")
    trt = (*cli, "bench", bundle, *bench, "trt", "--out", f"{out}/trt-bench")
    single = str(bundles / "sd-2")
    ort = (*cli, "bench", single, *bench, "ort-cuda", "--out", f"{out}/ort-cuda-bench")
    tests = ("python", "-m", "pytest", "-q", "-rs", "-m", "gpu", "tests/gpu")
    return [
        Part("trt-build", 120, build, no_trt),
        Part("trt-check", 90, (*cli, "check", bundle, "--json"), no_trt),
        Part("trt-bench", 120, trt, no_trt),
        Part("trt-tests", 200, tests, no_trt),
        Part("ort-cuda-bench", 90, ort, no_ort),
    ]


def installed(name: str) -> bool:
    """Whether a module, or a library beside one, is there; nothing is imported."""
    top, _, inside = name.partition(".")
    try:
        found = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    if found is None or not inside:
        return found is not None
    places = found.submodule_search_locations or ()
    return any(next(Path(p).glob(f"{inside.replace('.', '/lib')}*"), None) for p in places)


def run_parts(
    wanted: Sequence[Part],
    kit: Path,
    out: Path,
    environment: dict[str, str],
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Run each part within its limit and what is left of the budget; never stops at a failure."""
    end, outcomes = clock() + budget_s, []
    for part in wanted:
        begin = clock()
        left = min(part.limit_s, end - begin)
        if part.left_out:
            result = f"left out: {part.left_out}"
        elif left <= 1:
            result = "no time left"
        else:
            result = _run(part, kit, out, environment, left)
        outcomes.append(Outcome(part.name, clock() - begin, result))
        print(f"{part.name}: {result}, {outcomes[-1].seconds:.0f} s", flush=True)
    return outcomes


def _run(part: Part, kit: Path, out: Path, environment: dict[str, str], limit_s: float) -> str:
    command = [sys.executable if word == "python" else word for word in part.command]
    with (out / f"{part.name}.log").open("w") as log:
        try:
            made = subprocess.run(
                command, cwd=kit, env=environment, stdout=log, stderr=log, timeout=limit_s
            )
        except subprocess.TimeoutExpired:
            return "out of time"
        except OSError as error:
            log.write(f"{error}\n")
            return "failed (no such program)"
    if made.returncode:
        return f"failed ({made.returncode})"
    skipped = "pytest" in command and " passed" not in _text(out, f"{part.name}.log")
    return "failed (every test was skipped)" if skipped else "done"


# -- the kit ---------------------------------------------------------------------------------------


def make_kit(kit: Path) -> int:
    """Wheels, bundles and tests; returns their bytes."""
    root = Path(__file__).resolve().parents[2]
    make_wheels(root, kit / "wheels")
    make_bundles(root, kit / "bundles")
    copy_tests(root, kit)
    return sum(path.stat().st_size for path in kit.rglob("*") if path.is_file())


def make_wheels(root: Path, wheels: Path) -> None:
    """Our own with CUDA kernels for A100, H100 and H200, and the packages for the other machine."""
    pip = (sys.executable, "-m", "pip", "--quiet")
    defined = {"BLOCKCACHE_CUDA": "ON", "BLOCKCACHE_CUDA_ARCHITECTURES": "80-real;90-real"}
    settings = [f"--config-settings=cmake.define.{name}={v}" for name, v in defined.items()]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", wheels, root, *settings], check=True)
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run([*pip, "download", "-d", wheels, *WHEELS_FOR, *platforms, *PACKAGES], check=True)


def make_bundles(root: Path, bundles: Path) -> None:
    """The demo model in bfloat16, and the tests' tiny one, aligned by one and by two outputs."""
    from blockcache.export import CompileOptions, ExportOptions, PresetOptions, compile_model
    from blockcache.tools.sources.models import load_source

    tiny = runpy.run_path(str(root / "tests" / "conftest.py"))["make_tiny_model"]("sd")
    models = {"sd-1": (tiny, 1, "float32"), "sd-2": (tiny, 2, "float32")}
    models["demo"] = (load_source("demo", dtype="bfloat16"), 1, "bfloat16")
    for name, (model, outputs, precision) in models.items():
        presets = () if name == "demo" else ("ddim:4",)
        options = CompileOptions(
            presets=tuple(PresetOptions.parse(text) for text in (*presets, "dpm:20")),
            export=ExportOptions(outputs=outputs, precision=precision),
        )
        compile_model(model, bundles / name, options)


def copy_tests(root: Path, kit: Path) -> None:
    """This script, the tests that need a GPU, and pytest's settings."""
    kit.mkdir(parents=True, exist_ok=True)
    shutil.copy(__file__, kit / "gpu.py")
    shutil.copy(root / "pyproject.toml", kit)
    for name in TESTS:
        source, target = root / "tests" / name, kit / "tests" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)


def unpack(wheels: Path, site: Path) -> list[str]:
    """Unpack blockcache, and of the other wheels those whose modules are not there already.

    A wheel is an archive that can be imported from once it is unpacked, so that no pip is needed.
    """
    used = []
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            tops = {name.split("/")[0].removesuffix(".py") for name in archive.namelist()}
            modules = [top for top in tops if top.isidentifier()]
            if "blockcache" in modules or not all(map(installed, modules)):
                archive.extractall(site)
                used.append(wheel.name)
    return used


# -- the run ---------------------------------------------------------------------------------------


def run(kit: Path, out: Path, stand_in: Path | None) -> int:
    """Run every part, write the report; 1 where a part failed."""
    out.mkdir(parents=True, exist_ok=True)
    site, bundles = out / "work" / "site", out / "work" / "bundles"
    used = unpack(kit / "wheels", site)
    shutil.copytree(kit / "bundles", bundles, dirs_exist_ok=True)  # engines are built into them
    tested = {outputs: str(bundles / f"sd-{outputs}") for outputs in (1, 2)}
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]).rstrip(":"),
        "HF_HUB_OFFLINE": "1",
        "BLOCKCACHE_TEST_BUNDLES": json.dumps(tested),
        "BLOCKCACHE_TEST_DRIVER": str(stand_in or ""),
        "BLOCKCACHE_TEST_FIGURES": str(out),
    }
    wanted = first_stage(out, bundles, stand_in is not None)
    wanted += second_stage(out, bundles, (lambda name: False) if stand_in else installed)
    outcomes = run_parts(wanted, kit, out, environment)
    facts = machine(stand_in is not None, used)
    (out / "report.md").write_text(report(outcomes, facts, out))
    data: dict[str, object] = {"machine": facts, "parts": [asdict(each) for each in outcomes]}
    for name in ("kernels", "figures"):
        file = out / f"{name}.json"
        data[name] = json.loads(file.read_text()) if file.exists() else None
    (out / "report.json").write_text(json.dumps(data, indent=1) + "\n")
    shutil.rmtree(out / "work")
    return int(any(not o.result.startswith(("done", "left out")) for o in outcomes))


def machine(stand_in: bool, wheels: Sequence[str]) -> dict[str, str]:
    """Device, driver, date, versions."""
    asked = "no GPU: the stand-in driver of the tests" if stand_in else "no nvidia-smi"
    if not stand_in and shutil.which("nvidia-smi"):
        query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit"
        command = ["nvidia-smi", query, "--format=csv,noheader"]
        asked = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {
        "device, driver": asked,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "wheels unpacked": ", ".join(wheels) or "none",
    }


def report(outcomes: Sequence[Outcome], facts: dict[str, str], out: Path) -> str:
    """What ran, what it printed, and the end of what failed."""
    dry = "stand-in" in facts["device, driver"]
    title = "# A dry run of gpu.py on the stand-in driver" if dry else "# A run of gpu.py on a GPU"
    warning = (
        "**No GPU took part and no CUDA kernel ran.** This shows that the script and what it calls "
        "run to the end; times are of the stand-in's clock and a CPU, and say nothing of a GPU."
    )
    rows = [f"| {o.name} | {o.result} | {o.seconds:.0f} |" for o in outcomes]
    pages = [title, *([warning] if dry else []), "\n".join(f"- {k}: {v}" for k, v in facts.items())]
    pages.append("\n".join(["| part | result | s |", "|---|---|---:|", *rows]))
    shown = {"kernels-times": "## Kernels", "figures": "## The runtime, with PyTorch for engines"}
    for name, heading in shown.items():
        printed = _text(out, f"{name}.md") or _text(out, f"{name}.log")
        pages += [heading, printed] if printed else []
    pages += [path.read_text().strip() for path in sorted(out.glob("*-bench/report.md"))]
    for each in outcomes:
        if each.result.startswith(("failed", "out of time")):
            last = "\n".join(_text(out, f"{each.name}.log").splitlines()[-25:])
            pages += [f"## The end of {each.name}", f"```\n{last}\n```"]
    return "\n\n".join(page for page in pages if page) + "\n"


def _text(out: Path, name: str) -> str:
    file = out / name
    return file.read_text().strip() if file.exists() else ""


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("kit", help="make what the other machine needs")
    run_it = commands.add_parser("run", help="run it there")
    for each in (made, run_it):
        each.add_argument("kit", type=Path, help="folder")
    run_it.add_argument("out", type=Path, help="folder for the report")
    run_it.add_argument("--stand-in", type=Path, help="a CUDA driver in place of the machine's")
    options = parser.parse_args()
    if options.command == "run":
        return run(options.kit.resolve(), options.out.resolve(), options.stand_in)
    size = make_kit(options.kit)
    print(f"{options.kit}: {size / 1e6:.1f} MB")
    return int(size > MOST_BYTES)


if __name__ == "__main__":
    sys.exit(main())
