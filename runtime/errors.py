"""Everything blockcache raises on purpose.

::

    BlockCacheError
    ├── ConfigError             an option or combination of options that cannot work
    ├── UnsupportedModelError   a model feature that the exporter refuses by name
    ├── MissingExtraError       an optional package is not installed; names the pip command
    ├── BundleError             something is wrong with a bundle on disk
    │   ├── BundleFormatError       not a bundle, unknown version, malformed manifest
    │   ├── BundlePathError         a path that leaves the bundle's folder
    │   ├── BundleIntegrityError    a file is missing, truncated or altered
    │   ├── UnknownPresetError      no preset of that name
    │   ├── EnginesMissingError     no finished engines for a target
    │   ├── EnginesStaleError       engines built from an earlier compile of the bundle
    │   ├── WrongGpuError           engines built for another compute capability
    │   └── WrongLibraryError       engines built by another TensorRT, or another version of it
    ├── InputError              an argument of a request has the wrong type, shape, dtype or values
    ├── EngineError             the engine library failed; carries its message and the segment
    ├── ExportError             a graph the passes do not understand; names the node
    ├── QueueFullError          a continuous batch has as many requests waiting as it may
    ├── DeadlineError           a request of a continuous batch did not finish in time
    └── Cancelled               the caller cancelled a running denoise

Every message says what was expected, what came, and what to do, in that order.
"""

from __future__ import annotations


class BlockCacheError(Exception):
    """Base of every error that blockcache raises on purpose."""


class ConfigError(BlockCacheError, ValueError):
    """An option, or a combination of options, that cannot work."""


class UnsupportedModelError(BlockCacheError):
    """The model uses a feature that the exporter does not support; the message names it."""


class MissingExtraError(BlockCacheError, ImportError):
    """An optional dependency is not installed; the message holds the pip command."""

    @classmethod
    def of(cls, package: str, extra: str, purpose: str) -> MissingExtraError:
        """Build the error for ``package``, which the pip extra ``extra`` brings."""
        return cls(
            f"{purpose} needs the package {package}, which is not installed. "
            f"Install it with: pip install 'blockcache[{extra}]'"
        )


class BundleError(BlockCacheError):
    """Something is wrong with a bundle on disk."""


class BundleFormatError(BundleError):
    """Not a bundle, an unknown format version, or a malformed manifest."""


class BundlePathError(BundleError):
    """A path in the manifest leaves the bundle's folder."""


class BundleIntegrityError(BundleError):
    """A file of the bundle is missing, truncated or altered."""


class UnknownPresetError(BundleError, KeyError):
    """The bundle holds no preset of the name asked for."""

    def __str__(self) -> str:
        """The message itself: KeyError would print its repr."""
        return str(self.args[0])


class EnginesMissingError(BundleError):
    """The bundle holds no finished engines for the target."""


class EnginesStaleError(BundleError):
    """The engines were built from an earlier compile of the bundle."""


class WrongGpuError(BundleError):
    """The engines were built for another compute capability than the device's."""


class WrongLibraryError(BundleError):
    """The engines were built by another TensorRT library or version than the installed one."""


class InputError(BlockCacheError, ValueError):
    """An argument of a request has the wrong type, shape, dtype or values."""


class EngineError(BlockCacheError):
    """The engine library failed; the message names the segment and quotes the library."""


class ExportError(BlockCacheError):
    """A graph that the export passes do not understand; the message names the node."""


class QueueFullError(BlockCacheError):
    """A continuous batch has as many requests waiting as it may: try again later."""


class DeadlineError(BlockCacheError, TimeoutError):
    """A request of a continuous batch did not finish before its deadline."""


class Cancelled(BlockCacheError):  # noqa: N818 (an event, not a fault)
    """The caller cancelled a running ``denoise``."""
