"""blockcache.export: the offline stages, from a diffusers U-Net to a bundle and its engines.

::

    from blockcache.export import CompileOptions, PresetOptions, compile_model, load_model

    presets = (PresetOptions.parse("dpm:20"), PresetOptions.parse("dpm:20:every2"))
    made = compile_model(load_model("model"), "bundle", CompileOptions(presets=presets))
    made.bundle.recommended

The names below are the door. Each is imported when it is first asked for, so that building engines
needs no torch, and reading times neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockcache.export.align.distil import DistillationOptions as DistillationOptions
    from blockcache.export.align.fit import AlignmentOptions as AlignmentOptions
    from blockcache.export.choose.preset import PresetOptions as PresetOptions
    from blockcache.export.choose.trials import TrialOptions as TrialOptions
    from blockcache.export.costs.roofline import Processor as Processor
    from blockcache.export.costs.roofline import gpu as gpu
    from blockcache.export.costs.timings import Timings as Timings
    from blockcache.export.costs.timings import read_timings as read_timings
    from blockcache.export.engines.build import BuildOptions as BuildOptions
    from blockcache.export.engines.build import ShapeOptions as ShapeOptions
    from blockcache.export.engines.build import build_engines as build_engines
    from blockcache.export.engines.report import BuildReport as BuildReport
    from blockcache.export.engines.targets import Target as Target
    from blockcache.export.graph.to_onnx import ExportOptions as ExportOptions
    from blockcache.export.measure.calibration import Calibration as Calibration
    from blockcache.export.measure.calibration import encode_prompts as encode_prompts
    from blockcache.export.measure.calibration import read_calibration as read_calibration
    from blockcache.export.measure.change import ProfileOptions as ProfileOptions
    from blockcache.export.measure.control_images import control_size as control_size
    from blockcache.export.measure.control_images import with_control_images as with_control_images
    from blockcache.export.measure.converged import ConvergedOptions as ConvergedOptions
    from blockcache.export.measure.residuals import ResidualOptions as ResidualOptions
    from blockcache.export.measure.sensitivity import SensitivityOptions as SensitivityOptions
    from blockcache.export.measurements import MeasurementOptions as MeasurementOptions
    from blockcache.export.observer import Observer as Observer
    from blockcache.export.parts.load import load_parts as load_parts
    from blockcache.export.parts.part import Parts as Parts
    from blockcache.export.pipeline import Compiled as Compiled
    from blockcache.export.pipeline import CompileOptions as CompileOptions
    from blockcache.export.pipeline import compile_model as compile_model
    from blockcache.export.unet.load import load_model as load_model
    from blockcache.export.unet.lora import Lora as Lora
    from blockcache.export.unet.model import SourceModel as SourceModel
    from blockcache.export.unet.text import encode_text as encode_text

_HOMES = {
    "AlignmentOptions": "align.fit",
    "BuildOptions": "engines.build",
    "BuildReport": "engines.report",
    "Calibration": "measure.calibration",
    "Lora": "unet.lora",
    "MeasurementOptions": "measurements",
    "CompileOptions": "pipeline",
    "Compiled": "pipeline",
    "ConvergedOptions": "measure.converged",
    "DistillationOptions": "align.distil",
    "ExportOptions": "graph.to_onnx",
    "Observer": "observer",
    "Parts": "parts.part",
    "PresetOptions": "choose.preset",
    "Processor": "costs.roofline",
    "ProfileOptions": "measure.change",
    "ResidualOptions": "measure.residuals",
    "SensitivityOptions": "measure.sensitivity",
    "TrialOptions": "choose.trials",
    "ShapeOptions": "engines.build",
    "SourceModel": "unet.model",
    "Target": "engines.targets",
    "Timings": "costs.timings",
    "build_engines": "engines.build",
    "compile_model": "pipeline",
    "control_size": "measure.control_images",
    "encode_prompts": "measure.calibration",
    "encode_text": "unet.text",
    "gpu": "costs.roofline",
    "load_model": "unet.load",
    "load_parts": "parts.load",
    "read_calibration": "measure.calibration",
    "read_timings": "costs.timings",
    "with_control_images": "measure.control_images",
}
"""Public names, and the modules that they come from."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
