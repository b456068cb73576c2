"""``manifest.json``, both ways: model facts, segments, presets, sha256 of every file.

There is one way only to write it, and its first lines hold a checksum of the rest: a manifest that
was altered by one bit is refused. Reading takes nothing on trust: every field has its type and its
bounds, and an unknown field is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from blockcache.runtime.bundles.strict_json import Field, parse_json
from blockcache.runtime.errors import BundleFormatError, ConfigError
from blockcache.runtime.plan import (
    AXES,
    DTYPE_BYTES,
    MOST_SIZE,
    PART_ROLES,
    ROLES,
    BlockFacts,
    Dim,
    LoraFacts,
    ModelFacts,
    PipelineFacts,
    Role,
    Segment,
    Sizes,
    TensorSpec,
)
from blockcache.runtime.provenance import Provenance
from blockcache.runtime.solvers.recorded import SCHEDULER

FORMAT = "blockcache-bundle"
VERSION = 4
MANIFEST = "manifest.json"
WEIGHTS_FILE = "weights.bin"

PRECISIONS = ("float32", "bfloat16", "float16")
MOST_STEPS = 10_000
MOST_TIMESTEPS = 100_000
"""Of the training; diffusers' models have 1,000."""
MOST_SCALE = 1e6
"""Of a LoRA."""
MOST_BYTES = 1 << 50
"""Of a file."""

NOISE_LEVELS = "noise_levels"
"""Of ``PipelineFacts``, written where there are any."""

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}"
_PRESET = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_PATH = r"[^\x00-\x1f\x7f]{0,300}"  # what leaves the folder is refused where it is opened
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class FileEntry:
    """Size and content of a file, as the manifest promises them."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        """Read and hash a file."""
        with path.open("rb") as file:
            return cls.of_stream(file)

    @classmethod
    def of_stream(cls, file: BinaryIO) -> FileEntry:
        """Read and hash what is left of an open file."""
        digest, size = hashlib.sha256(), 0
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            size += len(chunk)
        return cls(size, digest.hexdigest())


@dataclass(frozen=True)
class PresetEntry:
    """A preset's line in the manifest: all but its tables."""

    file: str
    steps: int
    computed_fraction: float  # of the blocks' FLOPs, to six digits
    guidance_scale: float
    solver: Mapping[str, object]
    provenance: Provenance


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``."""

    model: ModelFacts
    segments: tuple[Segment, ...]
    recommended: str  # the preset to take where none is named
    presets: Mapping[str, PresetEntry]
    files: Mapping[str, FileEntry]
    unet_config: Mapping[str, object]  # of the model, as diffusers names it; for other programs
    pipeline: PipelineFacts | None = None  # text encoders and autoencoder, where the bundle has any
    loras: tuple[LoraFacts, ...] = ()  # merged into the weights

    @property
    def parts(self) -> tuple[Segment, ...]:
        """The segments beside the U-Net's."""
        return () if self.pipeline is None else self.pipeline.parts

    def to_json(self) -> str:
        """The manifest as text: one way only to write it; presets keep their order."""
        return signed(
            {
                "format": FORMAT,
                "version": VERSION,
                "model": to_plain(self.model),
                "unet_config": dict(sorted(self.unet_config.items())),
                "segments": [to_plain(segment) for segment in self.segments],
                **({} if self.pipeline is None else {"pipeline": to_plain(self.pipeline)}),
                **({"loras": to_plain(self.loras)} if self.loras else {}),
                "recommended": self.recommended,
                "presets": {name: to_plain(entry) for name, entry in self.presets.items()},
                "files": {name: to_plain(entry) for name, entry in sorted(self.files.items())},
            }
        )

    @classmethod
    def from_json(cls, content: bytes, where: str = MANIFEST) -> Manifest:
        """Read a manifest.

        Args:
            content: The file's bytes.
            where: Its path, for errors.

        Raises:
            BundleFormatError: it is no manifest, one of another version, or altered; or a field is
                missing, unknown, of another type or out of bounds. The error names it.
        """
        root = parse_json(content, where)
        if not isinstance(root.value, dict) or root.value.get("format") != FORMAT:
            raise BundleFormatError(f"Expected a {FORMAT} manifest, {where} is something else.")
        if root.value.get("version") != VERSION or type(root.value["version"]) is not int:
            raise BundleFormatError(
                f"Expected bundle format version {VERSION}, {where} has version "
                f"{str(root.value.get('version'))[:40]}. Compile the model again with this "
                f"blockcache, or install the version that wrote it."
            )
        optional = ["pipeline", "loras"]
        needed = [name for name in _names(cls) if name not in optional]
        found = root.fields(["format", "version", "checksum", *needed], optional=optional)
        if signed(root.value).encode() != content:
            raise BundleFormatError(
                f"The content of {where} does not match its own checksum: it was altered. Copy "
                f"the bundle again or compile again."
            )
        presets = _table(found["presets"], _PRESET, _preset_entry)
        model = _model_facts(found["model"])
        return cls(
            model=model,
            segments=tuple(segment_from_plain(field) for field in found["segments"].items()),
            recommended=found["recommended"].choice(list(presets)),
            presets=presets,
            files=_table(found["files"], _PATH, _file_entry),
            unet_config=_unet_config(found["unet_config"], model),
            pipeline=pipeline_from_plain(found["pipeline"]) if "pipeline" in found else None,
            loras=tuple(_lora(lora) for lora in found["loras"].items()) if "loras" in found else (),
        )


def signed(content: Mapping[str, object]) -> str:
    """A manifest's text, with the checksum that belongs to the rest of its content."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    checksum = hashlib.sha256(_render(rest).encode()).hexdigest()
    head = {"format": rest.pop("format"), "version": rest.pop("version"), "checksum": checksum}
    return _render(head | rest)


def _render(content: Mapping[str, object]) -> str:
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


# -- writing ---------------------------------------------------------------------------------------


def to_plain(value: Any) -> Any:
    """Dataclasses to JSON: dimensions as text, everything else as it is."""
    if isinstance(value, PipelineFacts) and not value.noise_levels:
        return {key: to_plain(getattr(value, key)) for key in _names(PipelineFacts, NOISE_LEVELS)}
    if isinstance(value, Segment | ModelFacts | PipelineFacts | PresetEntry | FileEntry):
        return {key: to_plain(getattr(value, key)) for key in value.__dataclass_fields__}
    if isinstance(value, TensorSpec):
        return {"name": value.name, "dtype": value.dtype, "dims": [_plain(d) for d in value.dims]}
    if isinstance(value, BlockFacts | Sizes | LoraFacts):
        return asdict(value)
    if isinstance(value, Provenance):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return value


def _plain(dim: Dim) -> str | int:
    return str(dim) if dim.axes else int(dim.coefficient)


# -- reading ---------------------------------------------------------------------------------------


def segment_from_plain(field: Field, roles: Sequence[Role] = ROLES) -> Segment:
    """The inverse of ``to_plain`` for a segment of one of ``roles``."""
    found = field.fields(_names(Segment))
    return _made(
        field,
        lambda: Segment(
            name=found["name"].matching(_NAME, "a segment's name"),
            role=found["role"].choice(roles),
            file=found["file"].text(),
            inputs=tuple(_tensor_spec(tensor) for tensor in found["inputs"].items()),
            outputs=tuple(_tensor_spec(tensor) for tensor in found["outputs"].items()),
            block=None if found["block"].value is None else found["block"].whole(0, 100_000),
            flops=found["flops"].whole(0, 1 << 63),
        ),
    )


def pipeline_from_plain(field: Field) -> PipelineFacts:
    """The inverse of ``to_plain`` for what stands beside the U-Net."""
    found = field.fields(_names(PipelineFacts, NOISE_LEVELS), optional=[NOISE_LEVELS])
    levels = found[NOISE_LEVELS].items() if NOISE_LEVELS in found else []
    zeros = found["zeros_without_negative"]
    zeros.require(isinstance(zeros.value, bool), "true or false")
    return PipelineFacts(
        parts=tuple(segment_from_plain(part, PART_ROLES) for part in found["parts"].items()),
        tokenizers=_table(found["tokenizers"], _NAME, lambda entry: entry.text()),
        zeros_without_negative=zeros.value is True,
        noise_levels=tuple(level.number(0, 1) for level in levels),
    )


def _model_facts(field: Field) -> ModelFacts:
    found = field.fields(_names(ModelFacts))
    conditions = tuple(_tensor_spec(tensor) for tensor in found["conditions"].items())
    named = any(c.name == "class_labels" and c.dtype == "int64" for c in conditions)
    classes = found["classes"].whole(0, 1 << 31)
    found["classes"].require((classes > 0) == named, "how many class_labels there are, else 0")
    return ModelFacts(
        name=found["name"].text(),
        sha256=found["sha256"].sha256(),
        precision=found["precision"].choice(PRECISIONS),
        channels=found["channels"].whole(1, 1 << 16),
        downsampling=found["downsampling"].whole(1, 1 << 16),
        outputs=found["outputs"].whole(1, 2),
        blocks=tuple(_block_facts(block) for block in found["blocks"].items()),
        sizes=_sizes(found["sizes"]),
        conditions=conditions,
        extra_inputs=_extra_inputs(found["extra_inputs"], conditions),
        classes=classes,
    )


def _extra_inputs(field: Field, conditions: Sequence[TensorSpec]) -> tuple[str, ...]:
    """Names of conditions that are pictures as large as the sample."""
    size = (Dim.parse("batch"), Dim.parse("height"), Dim.parse("width"))
    pictures = [
        spec.name
        for spec in conditions
        if len(spec.dims) == 4
        and (spec.dims[0], *spec.dims[2:]) == size
        and not spec.dims[1].axes
        and spec.dtype != "int64"
    ]
    names = tuple(each.choice(pictures) for each in field.items())
    field.require(len(set(names)) == len(names), "each condition once")
    return names


def _unet_config(field: Field, model: ModelFacts) -> Mapping[str, object]:
    """A config that says of the model what the manifest says."""
    found = field.table()
    extra = sum(model.extra_channels.values())
    for name, wanted, told in (
        ("in_channels", model.channels + extra, "with extra_inputs" if extra else ""),
        ("out_channels", model.channels, ""),
    ):
        channels = field.fields([name], optional=list(found))[name].whole(1, 1 << 16)
        said = " ".join(filter(None, (f"{wanted}, as model.channels", told)))
        found[name].require(channels == wanted, said)
    return {name: option.value for name, option in found.items()}


def _lora(field: Field) -> LoraFacts:
    found = field.fields(_names(LoraFacts))
    scale = found["scale"].number(-MOST_SCALE, MOST_SCALE)
    return LoraFacts(found["name"].text(), found["sha256"].sha256(), scale)


def _sizes(field: Field) -> Sizes:
    found = field.fields(AXES)
    return Sizes(**{axis: found[axis].whole(1, MOST_SIZE) for axis in AXES})


def _block_facts(field: Field) -> BlockFacts:
    found = field.fields(_names(BlockFacts))
    cut = None if found["cut"].value is None else found["cut"].whole(-1, 1000)
    return BlockFacts(found["path"].text(), found["channels"].whole(1, 1 << 16), cut)


def _tensor_spec(field: Field) -> TensorSpec:
    found = field.fields(_names(TensorSpec))
    return TensorSpec(
        name=found["name"].matching(_NAME, "a tensor's name"),
        dtype=found["dtype"].choice(sorted(DTYPE_BYTES)),
        dims=tuple(_dim(dim) for dim in found["dims"].items(most=8)),
    )


def _dim(field: Field) -> Dim:
    if not isinstance(field.value, str):
        return Dim.parse(field.whole(1, 1 << 40))
    dim: Dim = _made(field, lambda: Dim.parse(field.text(40)))
    field.require(_plain(dim) == field.value, f"the dimension {_plain(dim)!r}, written so")
    return dim


def _preset_entry(field: Field) -> PresetEntry:
    found = field.fields(_names(PresetEntry))
    return PresetEntry(
        file=found["file"].text(),
        steps=found["steps"].whole(1, MOST_STEPS),
        computed_fraction=found["computed_fraction"].number(0, 1),
        guidance_scale=found["guidance_scale"].number(0, 1000),
        solver=_solver(found["solver"]),
        provenance=_made(
            found["provenance"], lambda: Provenance.from_json(found["provenance"].value)
        ),
    )


def _solver(field: Field) -> Mapping[str, object]:
    """A solver's options: numbers within bounds here, everything else when the solver is made."""
    options = field.fields(["solver", "steps"], optional=list(field.table()))
    options["steps"].whole(1, MOST_STEPS)
    if options["solver"].value == SCHEDULER:
        return {name: option.value for name, option in options.items()}
    options = field.fields(["solver", "steps", "noise"], optional=list(options))
    noise = options["noise"].fields(["train_timesteps"], optional=list(options["noise"].table()))
    noise["train_timesteps"].whole(1, MOST_TIMESTEPS)
    betas = noise.get("trained_betas")
    if betas is not None and betas.value is not None:
        for beta in betas.items():
            beta.number(0, 1)
    return {name: option.value for name, option in options.items()}


def _file_entry(field: Field) -> FileEntry:
    found = field.fields(_names(FileEntry))
    return FileEntry(found["bytes"].whole(0, MOST_BYTES), found["sha256"].sha256())


def _table(field: Field, pattern: str, read: Callable[[Field], _Read]) -> dict[str, _Read]:
    """The entries of an object whose names match a pattern."""
    found = field.table()
    for name, entry in found.items():
        Field(name, entry.way, entry.where).matching(pattern, f"a name that {pattern} matches")
    return {name: read(entry) for name, entry in found.items()}


def _made(field: Field, make: Callable[[], _Read]) -> _Read:
    """What ``make`` makes of a field; its ConfigError becomes one that names the field."""
    try:
        return make()
    except ConfigError as error:
        raise BundleFormatError(
            f"{field.where}: {field.way!r} is wrong. {error} Compile the model again."
        ) from error


def _names(kind: type, without: str = "") -> list[str]:
    return [item.name for item in fields(kind) if item.name != without]
