"""blockcache.runtime: open a bundle, denoise. Imports numpy and one engine library.

It never imports torch, diffusers or onnx, so that a service can embed it.
"""

from blockcache.runtime.batching.batch import ContinuousBatch
from blockcache.runtime.batching.counters import BatchCounters
from blockcache.runtime.batching.outcome import BatchedResult, BatchFuture, BatchProgress
from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.bundles.manifest import Manifest
from blockcache.runtime.drift import DriftMonitor, DriftReport, Excess
from blockcache.runtime.engines.empty import EmptyBackend
from blockcache.runtime.engines.engine import Backend, Engine
from blockcache.runtime.errors import (
    BlockCacheError,
    BundleError,
    BundleFormatError,
    BundleIntegrityError,
    BundlePathError,
    Cancelled,
    ConfigError,
    DeadlineError,
    EngineError,
    EnginesMissingError,
    EnginesStaleError,
    ExportError,
    InputError,
    MissingExtraError,
    QueueFullError,
    UnknownPresetError,
    UnsupportedModelError,
    WrongGpuError,
    WrongLibraryError,
)
from blockcache.runtime.loop import Denoised, Progress
from blockcache.runtime.open_request import OpenRequest
from blockcache.runtime.pipeline.batched_pipeline import BatchedPipeline
from blockcache.runtime.pipeline.picture_outcome import (
    BatchedPicture,
    PictureFuture,
    PipelineCounters,
)
from blockcache.runtime.pipeline.pipeline import Drawn, Pipeline
from blockcache.runtime.plan import Alignment, Preset, Schedule, Segment, TensorSpec
from blockcache.runtime.provenance import Provenance
from blockcache.runtime.record import RunRecord
from blockcache.runtime.session import Session
from blockcache.runtime.solvers.noise import NoiseSchedule
from blockcache.runtime.solvers.solver import SolverConfig

__all__ = [
    "Alignment",
    "Backend",
    "BatchCounters",
    "BatchFuture",
    "BatchProgress",
    "BatchedPicture",
    "BatchedPipeline",
    "BatchedResult",
    "BlockCacheError",
    "Bundle",
    "BundleError",
    "BundleFormatError",
    "BundleIntegrityError",
    "BundlePathError",
    "Cancelled",
    "ConfigError",
    "ContinuousBatch",
    "DeadlineError",
    "Denoised",
    "Drawn",
    "DriftMonitor",
    "DriftReport",
    "EmptyBackend",
    "Engine",
    "EngineError",
    "EnginesMissingError",
    "EnginesStaleError",
    "Excess",
    "ExportError",
    "InputError",
    "Manifest",
    "MissingExtraError",
    "NoiseSchedule",
    "OpenRequest",
    "PictureFuture",
    "Pipeline",
    "PipelineCounters",
    "Preset",
    "Progress",
    "Provenance",
    "QueueFullError",
    "RunRecord",
    "Schedule",
    "Segment",
    "Session",
    "SolverConfig",
    "TensorSpec",
    "UnknownPresetError",
    "UnsupportedModelError",
    "WrongGpuError",
    "WrongLibraryError",
]
