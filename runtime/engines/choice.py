"""The choice of engine library by name; a library is imported when it is chosen."""

from __future__ import annotations

import logging
from typing import Any

from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.engines.empty import EmptyBackend
from blockcache.runtime.engines.engine import Backend
from blockcache.runtime.errors import ConfigError

_READS = {
    "empty": (),
    "ort": ("threads",),
    "ort-cuda": ("stream", "device"),
    "ort-tensorrt": ("stream", "device"),
    "trt": ("stream", "device", "graphs"),
}
"""The engine libraries by name, and the options that each reads."""


def make_backend(
    name: str = "auto",
    *,
    threads: int | None = None,
    bundle: Bundle | None = None,
    stream: Any = None,
    device: int | None = None,
    graphs: str | None = None,
    verify: bool = True,
) -> Backend:
    """The engine library called ``name``.

    Args:
        name: ``trt`` (TensorRT engines that ``blockcache build`` made), ``ort`` (ONNX Runtime on
            the CPU), ``ort-cuda`` and ``ort-tensorrt`` (ONNX Runtime on the GPU), ``empty``, or
            ``auto``: TensorRT where the bundle has engines and there is a GPU, else the CPU; a
            GPU or a driver that the library does not run with is warned of.
            ``auto`` hands on the options that the library it takes can read.
        threads: of ONNX Runtime on the CPU; default one a physical core.
        bundle: what it will run, for ``auto``.
        stream: the caller's CUDA stream.
        device: index of the CUDA device; default the stream's, else the current one.
        graphs: CUDA graphs of ``trt``: auto (the default), off, or check (compare addresses at
            each replay).
        verify: check the sha256 of engines.

    Raises:
        ConfigError: unknown name, or an option that the library would ignore.
        MissingExtraError: the library is not installed; the message holds the pip command.
        EngineError: there is no GPU for a library that needs one.
    """
    if name == "auto":
        name = _best(bundle, device)
    elif name in _READS:
        given = {"threads": threads, "stream": stream, "device": device, "graphs": graphs}
        refuse_options(repr(name), **{k: v for k, v in given.items() if k not in _READS[name]})
    if name == "empty":
        return EmptyBackend()
    if name == "ort":
        from blockcache.runtime.engines.ort import OrtBackend

        return OrtBackend(threads=threads)
    if name == "trt":
        from blockcache.runtime.engines.trt import TrtBackend

        return TrtBackend(stream=stream, device=device, graphs=graphs or "auto", verify=verify)
    if name in ("ort-cuda", "ort-tensorrt"):
        from blockcache.runtime.engines.ort_cuda import OrtCudaBackend

        return OrtCudaBackend(tensorrt=name == "ort-tensorrt", stream=stream, device=device)
    raise ConfigError(f"Expected a backend of {['auto', *_READS]}, got {name!r}.")


def refuse_options(backend: str, **options: object) -> None:
    """Raise ConfigError where an option was given that ``backend`` would ignore."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ConfigError(
            f"Expected no {' and no '.join(given)} with the backend {backend}, which would ignore "
            f"it. Leave it out, or choose the backend by a name that reads it."
        )


def require_members(backend: Backend) -> None:
    """Raise ConfigError where an object lacks a member of ``Backend``."""
    members = [name for name in vars(Backend) if not name.startswith("_")]
    lacking = [name for name in members if not hasattr(backend, name)]
    if lacking:
        raise ConfigError(
            f"Expected a backend: a name, or an object with {members}; {type(backend).__name__} "
            f"lacks {lacking}. EmptyBackend is a base class that has them all."
        )


def _best(bundle: Bundle | None, device: int | None) -> str:
    """TensorRT where engines and a GPU are there, else ONNX Runtime on the CPU."""
    if bundle is None or not any(bundle.folder.glob("engines/*/engines.json")):
        return "ort"
    from blockcache.runtime.devices.cuda_driver import (
        device_capability,
        device_count,
        driver_version,
    )
    from blockcache.runtime.engines.tensorrt_library import load_library

    if not device_count():
        return "ort"
    problem = load_library().problem(device_capability(device), driver_version())
    if problem:
        logging.getLogger("blockcache").warning("Backend 'auto' takes the CPU. %s", problem)
    return "ort" if problem else "trt"
