"""The bundle: a folder that holds everything the runtime needs.

::

    manifest.json                   format version, model facts, segments, presets, files
    segments/<content>/*.onnx       one graph a segment
    segments/<content>/weights.bin  the weights, once, shared by all graphs
    parts/<content>/                text encoders, tokenizers, autoencoder (not in every bundle)
    presets/<name>-<content>.safetensors    schedule, alignment and time tables of a preset
    profiles/*.safetensors          measured change[S, K]: mean, deviation (not read here)
    engines/<target>/               built engines (only where ``blockcache build`` ran)
    times/*.json                    measured times (only where ``blockcache check`` ran)

``<content>`` is the start of the content's hash. So a file that the manifest names never changes:
other content gets another name. Only ``manifest.json`` is ever replaced, by one rename, when all
that it names is on the disk. A folder without one is not a bundle, and a compile that stops
anywhere leaves the bundle that was there. Loading executes no code.

Everything is checked when the bundle opens, so that nothing is left for the first request
to find out: what opens, runs. Whoever can write to the folder can still put other weights in, with
hashes that agree; only a signature over the manifest could tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from blockcache.runtime.bundles.bundle_files import (
    FileIdentity,
    OpenedFile,
    open_files,
    require_unchanged,
    safe_path,
)
from blockcache.runtime.bundles.checks import (
    check_graph,
    check_pipeline,
    check_preset,
    check_segments,
)
from blockcache.runtime.bundles.manifest import MANIFEST, WEIGHTS_FILE, FileEntry, Manifest
from blockcache.runtime.bundles.onnx_signature import OnnxSignature, read_signature
from blockcache.runtime.bundles.strict_json import MOST_BYTES
from blockcache.runtime.bundles.tensor_files import parse_preset, parse_tensors
from blockcache.runtime.errors import BundleFormatError, BundleIntegrityError, UnknownPresetError
from blockcache.runtime.plan import ModelFacts, PipelineFacts, Preset, Segment, preset_name


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose parts agree."""

    folder: Path
    manifest: Manifest
    presets: Mapping[str, Preset] = field(compare=False)  # as they were read when it opened
    graphs: Mapping[str, OnnxSignature] = field(compare=False, repr=False)  # by segment name
    tokenizers: Mapping[str, bytes] = field(compare=False, repr=False)  # by text encoder, as read
    files: Mapping[str, FileIdentity] = field(compare=False, repr=False)  # by name in the manifest

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> Bundle:
        """Open a bundle after checking all of it.

        Args:
            folder: What ``blockcache compile`` wrote.
            verify: False does not read the weights, nor the files that only tools read: it
                compares their sizes. A bundle of gigabytes then opens at once, but altered
                weights go unnoticed.

        Raises:
            BundleFormatError: it is no bundle, or one of another format version, or two of its
                parts contradict each other. The error names the field.
            BundlePathError: a path leaves the folder.
            BundleIntegrityError: a file is missing, truncated or altered.
        """
        root = Path(folder)
        content = _manifest_bytes(root)
        try:
            return cls.of(root, Manifest.from_json(content, str(root / MANIFEST)), verify=verify)
        except BundleIntegrityError:  # a compile may have switched to a new bundle meanwhile
            if _manifest_bytes(root) == content:
                raise
            return cls.open(root, verify=verify)

    @classmethod
    def of(cls, root: Path, manifest: Manifest, *, verify: bool = True) -> Bundle:
        """The bundle that a manifest describes, after the same checks as in ``open``.

        A compile calls it before it writes the manifest.
        """
        check_segments(manifest.model, manifest.segments)
        if manifest.pipeline is not None:
            check_pipeline(manifest.model, manifest.segments, manifest.pipeline)
        segments = (*manifest.segments, *manifest.parts)
        graphs = {segment.name: segment.file for segment in segments}
        tables = {name: entry.file for name, entry in manifest.presets.items()}
        tokenizers = {} if manifest.pipeline is None else manifest.pipeline.tokenizers
        read = {*graphs.values(), *tables.values(), *tokenizers.values()}
        named = {*read, *_reports(manifest), weights_beside(manifest.segments)}
        _require_listed(named, manifest.files)
        opened = open_files(root, manifest.files, read=read, verify=verify)
        return cls(
            folder=root,
            manifest=manifest,
            presets={name: _preset(manifest, name, opened[file]) for name, file in tables.items()},
            graphs={
                segment.name: _graph(segment, graphs[segment.name], opened) for segment in segments
            },
            tokenizers={name: opened[file].content or b"" for name, file in tokenizers.items()},
            files={name: file.identity for name, file in opened.items()},
        )

    @property
    def model(self) -> ModelFacts:
        """Facts of the source model."""
        return self.manifest.model

    @property
    def unet_config(self) -> Mapping[str, object]:
        """The U-Net's config, as diffusers names it."""
        return self.manifest.unet_config

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All segments, in running order."""
        return self.manifest.segments

    @property
    def pipeline(self) -> PipelineFacts | None:
        """What stands beside the U-Net; None where the bundle holds the U-Net alone."""
        return self.manifest.pipeline

    @property
    def weights(self) -> FileEntry:
        """The file of weights that all segments share."""
        return self.manifest.files[weights_beside(self.segments)]

    def weights_of(self, segment: Segment) -> FileEntry:
        """The file of weights that a segment reads: the shared one, or a part's own."""
        named = self.segment_files(segment)[1:]
        return self.manifest.files[named[0]] if named else self.weights

    @property
    def recommended(self) -> str:
        """The preset to take where none is named."""
        return self.manifest.recommended

    @property
    def preset_names(self) -> tuple[str, ...]:
        """Names that ``preset`` takes."""
        return tuple(self.presets)

    def preset(self, name: str | None = None) -> Preset:
        """A preset, as it was read when the bundle opened; by default the recommended one.

        ``dpm:20:x2`` is taken for ``dpm-20-x2``.

        Raises:
            UnknownPresetError: there is none of this name; the error lists those there are.
        """
        text = self.recommended if name is None else str(name)
        known = text if text in self.presets else preset_name(text)
        if known not in self.presets:
            raise UnknownPresetError(
                f"Expected a preset of {list(self.preset_names)}, got {name!r}. Add one with "
                f"blockcache compile --preset."
            )
        return self.presets[known]

    def path(self, name: str) -> Path:
        """The file ``name`` of the manifest, inside the folder."""
        return safe_path(self.folder, name)

    def segment_path(self, segment: Segment) -> Path:
        """The segment's ONNX file."""
        return self.path(segment.file)

    def segment_files(self, segment: Segment) -> tuple[str, ...]:
        """Names of the files that a segment is made of: its graph, then its weights."""
        graph = PurePosixPath(segment.file)
        weights = {str(graph.with_name(w.file)) for w in self.graphs[segment.name].weights}
        return (str(graph), *sorted(weights))

    def require_unchanged(self, segment: Segment) -> None:
        """Raise BundleIntegrityError where a segment's files are not those that were checked.

        Engine libraries open files by path. Whoever lets one do so asks afterwards.
        """
        for name in self.segment_files(segment):
            require_unchanged(self.folder, name, self.files[name])

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """The tensors of a safetensors file that only tools read, such as a profile.

        Raises:
            BundleIntegrityError: it is missing or altered.
        """
        entry = {name: self.manifest.files[name]}
        content = open_files(self.folder, entry, read=entry, verify=True)[name].content
        return parse_tensors(content or b"", name)


def _manifest_bytes(root: Path) -> bytes:
    path = safe_path(root, MANIFEST)
    if not path.is_file():
        raise BundleFormatError(
            f"Expected a bundle with {MANIFEST} at {root}, found none. Either the path is "
            f"wrong or a compile did not finish: run blockcache compile again to resume it."
        )
    try:
        with path.open("rb") as file:
            return file.read(MOST_BYTES + 1)  # a longer file is refused by the parser
    except OSError as error:
        raise BundleFormatError(
            f"Expected to read {path}, got: {error.strerror}. Mend its permissions."
        ) from error


def weights_beside(segments: Sequence[Segment]) -> str:
    """The weights' name in the manifest: all segments and their weights lie in one folder."""
    return str(PurePosixPath(segments[0].file).with_name(WEIGHTS_FILE))


def _reports(manifest: Manifest) -> set[str]:
    """Files of what presets were made from, which only tools read."""
    made = [entry.provenance for entry in manifest.presets.values()]
    return {file for p in made for file in (p.profile, p.alignment_report) if file is not None}


def _require_listed(names: Iterable[str], files: Mapping[str, FileEntry]) -> None:
    missing = sorted(set(names) - files.keys())
    if missing:
        raise BundleFormatError(
            f"{MANIFEST} names {missing} without a size and sha256. Compile the model again."
        )


def _require_own(name: str, file: str, entry: FileEntry) -> None:
    """A preset's file is named by preset and content: tables of another one contradict that."""
    own = f"{name}-{entry.sha256[:12]}.safetensors"
    if PurePosixPath(file).name != own:
        raise BundleFormatError(
            f"Preset {name!r}: expected its tables in {own}, got {file}. Compile the model again."
        )


def _graph(segment: Segment, name: str, opened: Mapping[str, OpenedFile]) -> OnnxSignature:
    """A segment's graph, which agrees with the manifest."""
    graph = read_signature(opened[name].content or b"", name)
    folder = PurePosixPath(name).parent
    beside = {
        path.name: file.identity.bytes
        for path, file in ((PurePosixPath(other), file) for other, file in opened.items())
        if path.parent == folder and path.suffix != ".onnx"
    }
    check_graph(segment, graph, beside)
    return graph


def _preset(manifest: Manifest, name: str, file: OpenedFile) -> Preset:
    """A preset's tables, which agree with the manifest."""
    entry = manifest.presets[name]
    preset = parse_preset(file.content or b"", name, entry)
    check_preset(manifest.model, manifest.segments, preset, entry)
    _require_own(name, entry.file, manifest.files[entry.file])
    return preset
