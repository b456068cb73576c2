"""``engines/<target>/``: what a build wrote there, and whether it fits this bundle and machine.

::

    engines/sm80/engines.json        library, version, capabilities, profiles, one entry an engine
    engines/sm80/block_00-*.plan     the engine of segment block_00, by what it was built from
    engines/sm80/runtime-*.cache     kernels that TensorRT-RTX compiled at first run (made by it)

``engines.json`` is written last and stands on its own: ``blockcache build`` never touches the
bundle's manifest. It names the ONNX file and the weights each engine was built from, so that
engines of an earlier compile are noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.bundles.bundle_files import safe_path
from blockcache.runtime.errors import (
    BundleFormatError,
    BundleIntegrityError,
    ConfigError,
    EnginesMissingError,
    EnginesStaleError,
    WrongGpuError,
    WrongLibraryError,
)
from blockcache.runtime.files import write_text
from blockcache.runtime.plan import AXES, PART_ROLES, Segment, Sizes

FORMAT = "blockcache-engines"
VERSION = 1
ENGINES_FILE = "engines.json"


@dataclass(frozen=True)
class ShapeProfile:
    """Smallest, usual and largest size of every axis that an engine accepts."""

    minimum: Sizes
    optimum: Sizes
    maximum: Sizes

    @classmethod
    def from_json(cls, content: Mapping[str, object]) -> ShapeProfile:
        """From three sizes by name."""
        return cls(**{extent: Sizes.from_json(sizes) for extent, sizes in content.items()})

    def __str__(self) -> str:
        def extent(axis: str) -> str:
            low, high = self.minimum.along(axis), self.maximum.along(axis)
            return str(low) if low == high else f"{low}..{high}"

        return ", ".join(f"{axis} {extent(axis)}" for axis in AXES)


@dataclass(frozen=True)
class EngineEntry:
    """One engine: its file and what it was built from."""

    file: str  # beside engines.json
    key: str  # hash of everything that the engine depends on
    bytes: int
    sha256: str
    onnx_sha256: str
    weights_file_sha256: str  # of the bundle's weights.bin when this engine was built
    seconds: float
    formats: Mapping[str, str]  # tensor name -> "linear" or "hwc8"
    kernels: int  # launches of one execution
    scratch_bytes: int  # at the largest profile; 0 where the library did not say
    facts: Mapping[str, int] = field(default_factory=dict)  # fusions seen, see the build report
    copied: Sequence[str] = ()  # boundary tensors that a kernel only copies to another layout

    def __post_init__(self) -> None:
        for name, kind in _ENTRY_TYPES.items():
            if type(getattr(self, name)) is not kind:
                raise ConfigError(
                    f"Expected {name!r} of an engine as {kind.__name__}, got "
                    f"{getattr(self, name)!r}."
                )
        object.__setattr__(self, "copied", tuple(self.copied))  # JSON has lists


_TEXTS = ("file", "key", "sha256", "onnx_sha256", "weights_file_sha256")
_ENTRY_TYPES = dict.fromkeys(_TEXTS, str) | dict.fromkeys(
    ("bytes", "kernels", "scratch_bytes"), int
)


@dataclass(frozen=True)
class EngineSet:
    """The content of ``engines.json``."""

    target: str
    library: str
    version: str  # of the library
    capabilities: tuple[str, ...]  # "8.0", ...
    precision: str
    weights: str  # "included" in the plans, "refittable", or "stripped" from them
    weights_sha256: str  # of the bundle's weights.bin at the last build
    profiles: tuple[ShapeProfile, ...]
    engines: Mapping[str, EngineEntry]  # by segment name

    def to_json(self) -> str:
        """The file's text: sorted keys, one way only to write it."""
        content = {"format": FORMAT, "version_of_format": VERSION, **asdict(self)}
        return json.dumps(content, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = ENGINES_FILE) -> EngineSet:
        """Read the file; BundleFormatError where it is not one or of another version."""
        try:
            content = json.loads(text)
            if content.pop("format") != FORMAT or content.pop("version_of_format") != VERSION:
                raise ValueError(f"expected format {FORMAT} version {VERSION}")
            content["profiles"] = tuple(ShapeProfile.from_json(p) for p in content["profiles"])
            content["capabilities"] = tuple(content["capabilities"])
            content["engines"] = {
                name: EngineEntry(**entry) for name, entry in content["engines"].items()
            }
            return cls(**content)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BundleFormatError(
                f"{where} is malformed: {type(error).__name__}: {error}. Build the engines again "
                f"with blockcache build."
            ) from error


def engines_folder(bundle: Bundle, target: str) -> Path:
    """Where the engines of ``target`` lie."""
    return safe_path(bundle.folder, f"engines/{target}")


def built_targets(bundle: Bundle) -> tuple[str, ...]:
    """Targets with a finished build, by name."""
    found = sorted((bundle.folder / "engines").glob(f"*/{ENGINES_FILE}"))
    return tuple(path.parent.name for path in found)


def write_engines(bundle: Bundle, engines: EngineSet) -> None:
    """Write ``engines.json`` of a finished build."""
    write_text(engines_folder(bundle, engines.target) / ENGINES_FILE, engines.to_json())


def read_engines(bundle: Bundle, target: str) -> EngineSet:
    """Read ``engines.json``; EnginesMissingError where there is no finished build."""
    path = engines_folder(bundle, target) / ENGINES_FILE
    if not path.is_file():
        built = built_targets(bundle)
        raise EnginesMissingError(
            f"Expected finished engines for {target!r} in {bundle.folder}, found "
            f"{list(built) or 'none'}. Build them: blockcache build {bundle.folder} "
            f"--target {target}"
        )
    return EngineSet.from_json(path.read_bytes().decode(errors="replace"), str(path))


def check_engines(
    bundle: Bundle, engines: EngineSet, library: str, version: str, capability: str
) -> None:
    """Raise where engines do not fit this library, this GPU or this bundle.

    Args:
        bundle: the bundle they lie in.
        engines: as read.
        library: the installed library's module name.
        version: its version.
        capability: of the device in use, such as "8.0"; "" leaves that check out.
    """
    again = f"blockcache build {bundle.folder} --target {engines.target}"
    if (engines.library, engines.version) != (library, version):
        raise WrongLibraryError(
            f"Expected {engines.library} {engines.version}, which built the engines for "
            f"{engines.target!r}, got {library} {version}. Install that version, or build again: "
            f"{again}"
        )
    if capability and capability not in engines.capabilities:
        raise WrongGpuError(
            f"Expected a GPU of compute capability {' or '.join(engines.capabilities)} for the "
            f"engines {engines.target!r}, got {capability}. Build for this one: blockcache build "
            f"{bundle.folder} --target sm{capability.replace('.', '')}"
        )
    changed = bundle.weights.sha256 != engines.weights_sha256
    if changed and engines.weights == "included":  # others are refitted when they are opened
        raise EnginesStaleError(
            f"Expected engines built from this bundle's weights, {engines.target!r} was built "
            f"from others: the bundle was compiled again. Build again (engines that did not "
            f"change are kept): {again}"
        )


def read_plan(
    bundle: Bundle, engines: EngineSet, segment: Segment, *, verify: bool = True
) -> bytes:
    """The plan of a segment: the very bytes that were checked.

    Raises:
        EnginesMissingError: the target has no engine of this segment.
        EnginesStaleError: the segment's ONNX file is another one by now.
        BundleIntegrityError: the plan is missing, truncated or altered.
    """
    again = f"Build again: blockcache build {bundle.folder} --target {engines.target}"
    entry = engines.engines.get(segment.name)
    if entry is None:
        raise EnginesMissingError(
            f"Expected an engine of segment {segment.name!r} among those for "
            f"{engines.target!r}, found none. {again}"
        )
    if entry.onnx_sha256 != bundle.manifest.files[segment.file].sha256:
        raise EnginesStaleError(
            f"Expected an engine built from this bundle's {segment.file}, found one of an earlier "
            f"compile. {again}"
        )
    own = segment.role in PART_ROLES and engines.weights == "included"
    if own and entry.weights_file_sha256 != bundle.weights_of(segment).sha256:
        raise EnginesStaleError(
            f"Expected an engine built from this bundle's weights of {segment.name!r}, found one "
            f"of an earlier compile. {again}"
        )
    path = safe_path(bundle.folder, f"engines/{engines.target}/{entry.file}")
    if not path.is_file():
        raise BundleIntegrityError(f"Expected {path}, it is missing. {again}")
    content = path.read_bytes()
    if len(content) != entry.bytes:
        raise BundleIntegrityError(
            f"Expected {entry.bytes} bytes in {path}, got {len(content)}: the file is truncated or "
            f"was replaced. {again}"
        )
    if verify and hashlib.sha256(content).hexdigest() != entry.sha256:
        raise BundleIntegrityError(
            f"The content of {path} does not match its sha256 in {ENGINES_FILE}: it was altered. "
            f"{again}"
        )
    return content
