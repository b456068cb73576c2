"""Which TensorRT is installed, what it can do, and its log: the same door for build and run.

Two libraries have the same Python API: ``tensorrt`` (data-centre GPUs) and ``tensorrt_rtx`` (named
compute capabilities, builds without a GPU, compiles its kernels at first run). The properties of
``TensorRT`` are all the differences between them, and between major versions, that matter here.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from blockcache.runtime.errors import ConfigError, EngineError, MissingExtraError

LIBRARIES = {"tensorrt_rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}
"""Module names, in order of preference, with the pip extra that brings each."""

KEPT_MESSAGES = 50
"""How many warnings and errors are kept for quoting."""

_DRIVERS = {13: "580", 12: "525"}
"""The first driver release for each major version of CUDA: all of a major version run on it."""


INSTEAD_OF_RTX = (
    "Take the data-centre TensorRT (pip install 'blockcache[tensorrt]', then build on that GPU "
    "with --target current), or ONNX Runtime on the GPU (pip install 'blockcache[gpu]', backend "
    "'ort-cuda')."
)


def dotted(capability: str) -> str:
    """A compute capability as the driver writes it: "8.0" for "SM80"."""
    return f"{capability[2:-1]}.{capability[-1]}"


def _numbers(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))


@dataclass(frozen=True)
class TensorRT:
    """An imported TensorRT library."""

    name: str  # a key of LIBRARIES
    module: Any
    logger: Any  # an ILogger with ``messages``, which are Messages

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
    def dotted_capabilities(self) -> tuple[str, ...]:
        """The same as the driver writes them, in order: "7.5", "8.0"."""
        return tuple(sorted((dotted(name) for name in self.capabilities), key=_numbers))

    def gpu_problem(self, capability: str) -> str:
        """Why the library does not run on GPUs such as "9.0"; "" where it may.

        TensorRT-RTX is for the GPUs it names, and for later ones than those.
        """
        named = self.dotted_capabilities
        if not named or capability in named or _numbers(capability) > max(map(_numbers, named)):
            return ""
        return (
            f"Expected a GPU of compute capability {', '.join(named)}, got {capability}: "
            f"{self.name} {self.version} does not run on it. {INSTEAD_OF_RTX}"
        )

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

    @property
    def cuda_major(self) -> int | None:
        """The CUDA version that the installed wheel is for, as its name says; None: unknown."""
        for major in _DRIVERS:
            with contextlib.suppress(metadata.PackageNotFoundError):
                metadata.version(f"{self.name}_cu{major}")
                return major
        return None

    def problem(self, capability: str, found: tuple[int, int]) -> str:
        """Why the library does not run on a GPU with a driver for CUDA ``found``; "" if it may."""
        return self.gpu_problem(capability) or self.driver_problem(found)

    def driver_problem(self, found: tuple[int, int]) -> str:
        """What is wrong with a driver for CUDA ``found`` (major, minor); "" where it will do."""
        needed = self.cuda_major
        if needed is None or found[0] >= needed:
            return ""
        return (
            f"Expected a driver for CUDA {needed}.0 or later (release {_DRIVERS[needed]} or "
            f"later), which {self.name} {self.version} needs, found one for CUDA "
            f"{found[0]}.{found[1]}. Update the driver, or install the library for CUDA "
            f"{found[0]}: pip install {self.name.replace('_', '-')}-cu{found[0]}"
        )

    def log(self) -> AbstractContextManager[list[tuple[str, str]]]:
        """Collect what the library says inside: (one of V I W E F, message)."""
        messages: Messages = self.logger.messages
        return messages.collected()

    def quoted(self, lines: Iterable[tuple[str, str]] = (), limit: int = 3) -> str:
        """The first errors among ``lines``, else the last warnings and errors of the process."""
        errors = [message.strip() for letter, message in lines if letter in "EF"][:limit]
        recent = [message.strip() for _, message in self.logger.messages.recent][-limit:]
        return " | ".join(errors or recent) or "nothing"


class Messages:
    """What a library says: the last warnings and errors, and all of it to those who collect.

    Threads may collect side by side; then each also gets what the library says to the other.
    """

    def __init__(self) -> None:
        self.recent: deque[tuple[str, str]] = deque(maxlen=KEPT_MESSAGES)
        self._collecting: list[list[tuple[str, str]]] = []

    def add(self, letter: str, message: str) -> None:
        """Note a message of one of the severities V I W E F."""
        if letter in "WEF":
            self.recent.append((letter, message))
        for lines in tuple(self._collecting):
            lines.append((letter, message))

    @contextmanager
    def collected(self) -> Iterator[list[tuple[str, str]]]:
        """Everything that is said inside."""
        lines: list[tuple[str, str]] = []
        self._collecting.append(lines)
        try:
            yield lines
        finally:
            self._collecting = [other for other in self._collecting if other is not lines]


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

    class KeepingLogger(module.ILogger):  # type: ignore[misc]
        """Hands what the library says to ``messages``."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.messages = Messages()

        def log(self, severity: Any, message: str) -> None:
            self.messages.add(letters.get(severity, "I"), message)

    return KeepingLogger()
