"""Record the Python API of a TensorRT wheel, so that the adapter is tested against its names.

    pip download --no-deps tensorrt_cu13_bindings==11.4.0.106 -d wheels
    python tools/dev/record_tensorrt_api.py wheels/*.whl tests/golden/tensorrt_api.json

The bindings wheels lack NVIDIA's libraries, but they need a dozen C functions of these only when
called: stand-ins that hold just the symbols let the module be imported and looked at. The installed
``tensorrt_rtx`` is recorded beside the wheels.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

Api: TypeAlias = dict[str, list[str] | dict[str, int]]

CLASSES = (
    "Builder",
    "BuilderFlag",
    "ComputeCapability",
    "CudaGraphStrategy",
    "DynamicShapesKernelSpecializationStrategy",
    "EngineInspector",
    "ExecutionContextAllocationStrategy",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IRuntimeCache",
    "IRuntimeConfig",
    "ITensor",
    "ITimingCache",
    "LayerInformationFormat",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "OnnxParserRefitter",
    "ParserError",
    "ProfilingVerbosity",
    "Refitter",
    "Runtime",
    "TensorFormat",
)
"""What the builder and the runtime touch."""

FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")


def api_of(module: ModuleType) -> Api:
    """Members of every class that the module has; those of enumerations with their values."""
    return {name: _members(getattr(module, name)) for name in CLASSES if hasattr(module, name)}


def _members(found: Any) -> list[str] | dict[str, int]:
    if hasattr(found, "__members__"):
        return {name: int(value) for name, value in found.__members__.items()}
    return sorted(name for name in dir(found) if not name.startswith("_"))


def record_wheel(wheel: Path) -> tuple[str, Api]:
    """Unpack a bindings wheel beside stand-ins for its libraries and import it elsewhere."""
    version = wheel.name.split("-")[1]
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        source = Path(folder) / "stand_in.c"
        source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
        for library in LIBRARIES:
            made = Path(folder) / f"lib{library}.so.{version.split('.')[0]}"
            subprocess.run(["cc", "-shared", "-fPIC", "-o", made, source], check=True)
        printed = subprocess.run(
            [sys.executable, __file__, "--import", "tensorrt_bindings"],
            env={"LD_LIBRARY_PATH": folder, "PYTHONPATH": folder},
            check=True,
            capture_output=True,
            text=True,
        )
    return f"tensorrt {version}", json.loads(printed.stdout)


def main(arguments: list[str]) -> None:
    """Record wheels, and ``tensorrt_rtx`` where it is installed, into a JSON file."""
    if arguments[0] == "--import":
        print(json.dumps(api_of(importlib.import_module(arguments[1]))))
        return
    *wheels, target = (Path(argument) for argument in arguments)
    recorded = dict(record_wheel(wheel) for wheel in wheels)
    rtx = importlib.import_module("tensorrt_rtx")
    recorded[f"tensorrt_rtx {rtx.__version__}"] = api_of(rtx)
    target.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
