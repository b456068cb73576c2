"""Which TensorRT is installed, what it can do, and its log: the same door for build and run.

Two libraries have the same Python API: ``tensorrt`` (data-centre GPUs) and ``tensorrt_rtx`` (named
compute capabilities, builds without a GPU, compiles its kernels at first run). The properties of
``TensorRT`` are all the differences between them, and between major versions, that matter here.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from blockcache.runtime.errors import ConfigError, EngineError, MissingExtraError

LIBRARIES = {"tensorrt_rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}
"""Module names, in order of preference, with the pip extra that brings each."""


@dataclass(frozen=True)
class TensorRT:
    """An imported TensorRT library."""

    name: str  # a key of LIBRARIES
    module: Any
    logger: Any  # an ILogger with a list ``lines`` of (severity letter, message)

    @property
    def version(self) -> str:
        """The library's full version: plans belong to exactly one."""
        return str(self.module.__version__)

    @property
    def major(self) -> int:
        """Major version number."""
        return int(self.version.split(".")[0])

    @property
    def is_rtx(self) -> bool:
        """Whether this is TensorRT for RTX, numbered on its own."""
        return self.name == "tensorrt_rtx"

    @property
    def network_flags(self) -> int:
        """Argument of ``create_network`` for strong typing: needed in 10.x, later ignored."""
        flags = getattr(self.module, "NetworkDefinitionCreationFlag", None)
        strong = getattr(flags, "STRONGLY_TYPED", None)
        return 0 if strong is None else 1 << int(strong)

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Compute capabilities that the builder takes by name ("SM80"); none: only the device's."""
        named = getattr(self.module, "ComputeCapability", None)
        if named is None:
            return ()
        return tuple(name for name in named.__members__ if name.startswith("SM"))

    @property
    def has_timing_cache(self) -> bool:
        """Whether a timing cache speeds up a second build (in RTX it is accepted and ignored)."""
        return not self.is_rtx

    @property
    def resizes_bfloat16(self) -> bool:
        """Whether Resize takes bfloat16: seen to work in RTX; older TensorRT refuses it."""
        return self.is_rtx or self.major >= 11

    def flag(self, name: str) -> Any:
        """The builder flag ``name``; ConfigError where this library has none of that name."""
        try:
            return getattr(self.module.BuilderFlag, name)
        except AttributeError as error:
            raise ConfigError(
                f"Expected a library with the builder flag {name}, got {self.name} "
                f"{self.version}. Leave the option out, or install another version."
            ) from error

    def has_flag(self, name: str) -> bool:
        """Whether the builder flag ``name`` exists here."""
        return hasattr(self.module.BuilderFlag, name)

    @contextmanager
    def log(self) -> Iterator[list[tuple[str, str]]]:
        """Collect what the library says inside: (one of V I W E F, message)."""
        lines: list[tuple[str, str]] = []
        before, self.logger.lines = self.logger.lines, lines
        try:
            yield lines
        finally:
            self.logger.lines = before


@functools.cache
def load_library(name: str = "auto") -> TensorRT:
    """Import a TensorRT library: "tensorrt_rtx", "tensorrt", or "auto" for the first installed.

    Raises:
        ConfigError: unknown name.
        MissingExtraError: not installed; the message holds the pip command.
        EngineError: installed, but it cannot be loaded.
    """
    if name != "auto" and name not in LIBRARIES:
        raise ConfigError(f"Expected a library of {['auto', *LIBRARIES]}, got {name!r}.")
    for candidate, extra in LIBRARIES.items():
        if name not in ("auto", candidate):
            continue
        try:
            module = importlib.import_module(candidate)
        except ModuleNotFoundError as error:
            if name == candidate:
                raise MissingExtraError.of(
                    candidate, extra, "Building or running engines"
                ) from error
        except (ImportError, OSError, RuntimeError) as error:
            raise EngineError(
                f"Expected {candidate} to load, got: {error}. Reinstall it with: "
                f"pip install --force-reinstall 'blockcache[{extra}]'"
            ) from error
        else:
            return TensorRT(candidate, module, _make_logger(module))
    raise MissingExtraError.of(
        "tensorrt_rtx (or tensorrt)", "tensorrt-rtx", "Building or running engines"
    )


def _make_logger(module: Any) -> Any:
    """One logger a process: TensorRT keeps the first it is given and ignores all later ones."""
    letters = {
        module.ILogger.Severity.VERBOSE: "V",
        module.ILogger.Severity.INFO: "I",
        module.ILogger.Severity.WARNING: "W",
        module.ILogger.Severity.ERROR: "E",
        module.ILogger.Severity.INTERNAL_ERROR: "F",
    }

    class ListLogger(module.ILogger):  # type: ignore[misc]
        """Appends to ``lines``; outside ``TensorRT.log`` messages are dropped."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.lines: list[tuple[str, str]] | None = None

        def log(self, severity: Any, message: str) -> None:
            if self.lines is not None:
                self.lines.append((letters.get(severity, "I"), message))

    return ListLogger()


def errors_of(lines: list[tuple[str, str]], limit: int = 3) -> str:
    """The first error messages of a log, for quoting."""
    found = [message.strip() for letter, message in lines if letter in "EF"]
    return " | ".join(found[:limit]) or "no message"
