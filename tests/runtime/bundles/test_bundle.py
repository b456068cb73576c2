"""The bundle on disk: golden bytes, round trip, and every way in which it can be hostile."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockcache.runtime import (
    Alignment,
    Bundle,
    BundleFormatError,
    BundleIntegrityError,
    BundlePathError,
    Manifest,
    Preset,
    Schedule,
    Segment,
    Session,
    TensorSpec,
    UnknownPresetError,
)
from blockcache.runtime.bundles import bundle as bundle_module
from blockcache.runtime.bundles.bundle_files import hash_files, safe_path
from blockcache.runtime.bundles.manifest import FileEntry, PresetEntry, signed
from blockcache.runtime.bundles.tensor_files import (
    parse_preset,
    preset_bytes,
    read_tensors,
    write_tensors,
)
from blockcache.runtime.plan import BlockFacts, Dim, ModelFacts, Sizes
from blockcache.runtime.provenance import Provenance
from blockcache.runtime.solvers.solver import SolverConfig

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "manifest.json"


def spec(name, *sizes, dtype="float32"):
    return TensorSpec(name, dtype, tuple(Dim.parse(size) for size in sizes))


CONTENT = "segments/0123456789ab"


def small_manifest():
    """A prompt segment, two trunks and a block, by hand."""
    x = ("batch", 4, "height", "width")
    segments = (
        Segment("prompt", "prompt", f"{CONTENT}/prompt.onnx",
                (spec("encoder_hidden_states", "batch", "tokens", 8),
                 spec("class_labels", "batch", dtype="int64")),
                (spec("prompt_0", "batch", "height*width/4", "tokens", 8),), flops=5),
        Segment("trunk_00", "trunk", f"{CONTENT}/trunk_00.onnx", (spec("sample", *x),),
                (spec("trunk_0_0", "batch", 8, "height/2", "width/2"),), flops=1200),
        Segment("block_00", "block", f"{CONTENT}/block_00.onnx",
                (spec("trunk_0_0", "batch", 8, "height/2", "width/2"),
                 spec("prompt_0", "batch", "height*width/4", "tokens", 8)),
                (spec("block_0", "batch", 8, "height/2", "width/2"),), block=0, flops=3400),
        Segment("trunk_01", "trunk", f"{CONTENT}/trunk_01.onnx",
                (spec("trunk_0_0", "batch", 8, "height/2", "width/2"),
                 spec("block_0", "batch", 8, "height/2", "width/2"),
                 spec("scale_0", "batch", 8, 1, 1), spec("shift_0", "batch", 8, 1, 1)),
                (spec("model_output", *x),)),
    )  # fmt: skip
    model = ModelFacts(
        name="hand-made",
        sha256="ab" * 32,
        precision="float32",
        channels=4,
        downsampling=2,
        outputs=1,
        blocks=(BlockFacts("mid_block.attentions.0", 8),),
        sizes=Sizes(batch=2, height=16, width=24, tokens=7),
        conditions=(
            spec("encoder_hidden_states", "batch", "tokens", 8),
            spec("class_labels", "batch", dtype="int64"),
        ),
        classes=5,
    )
    solver = SolverConfig(solver="ddim", steps=4).to_json()
    policy = Provenance(kind="threshold", value=0.5)
    preset = PresetEntry(
        "presets/ddim-4-d0.5-cdcdcdcdcdcd.safetensors", 4, 0.625, 5.0, solver, policy
    )
    files = {s.file: FileEntry(100 + i, f"{i:064x}") for i, s in enumerate(segments)}
    files |= {f"{CONTENT}/weights.bin": FileEntry(500, "ef" * 32)}
    files |= {preset.file: FileEntry(77, "cd" * 32)}
    config = {"in_channels": 4, "out_channels": 4, "sample_size": [16, 24]}
    return Manifest(model, segments, "ddim-4-d0.5", {"ddim-4-d0.5": preset}, files, config)


# -- the format ------------------------------------------------------------------------------------


def test_the_manifest_is_written_byte_for_byte_as_the_golden_file():
    assert small_manifest().to_json().encode() == GOLDEN.read_bytes()


def test_the_golden_file_is_read_back_as_the_manifest():
    assert Manifest.from_json(GOLDEN.read_bytes()) == small_manifest()


def test_a_real_manifest_survives_a_round_trip(compiled):
    _, bundle = compiled("sd")
    content = (bundle.folder / "manifest.json").read_bytes()
    assert Manifest.from_json(content).to_json().encode() == content


def test_a_preset_survives_a_round_trip(tmp_path):
    schedule = Schedule(np.array([[1, 1], [0, 1], [1, 0]], bool))
    tables = Alignment.identity(3, (4, 8)).tables
    tables[0][1] = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
    rows = {"time_row_0": np.arange(15, dtype=np.float32).reshape(3, 5)}
    made = Provenance(kind="threshold", value=0.5)
    preset = Preset("p", {"solver": "ddim"}, schedule, Alignment(tables), rows, 2.5, made)
    (tmp_path / "p.safetensors").write_bytes(preset_bytes(preset))
    entry = PresetEntry("p.safetensors", 3, 0.6, 2.5, {"solver": "ddim"}, made)
    read = parse_preset((tmp_path / "p.safetensors").read_bytes(), "p", entry)
    assert (read.schedule.recompute == schedule.recompute).all()
    for before, after in zip(tables, read.alignment.tables, strict=True):
        np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(read.time_tables["time_row_0"], rows["time_row_0"])
    assert (read.name, read.solver, read.guidance_scale, read.provenance) == (
        "p", {"solver": "ddim"}, 2.5, made,
    )  # fmt: skip


def test_an_intact_bundle_opens(compiled):
    _, bundle = compiled("sd")
    opened = Bundle.open(bundle.folder)
    assert opened.manifest == bundle.manifest
    assert set(opened.preset_names) == {"ddim-4", "dpm-20"}
    assert opened.preset("ddim-4").schedule.steps == 4


def found(folder, pattern):
    """The name of the one file of a bundle that a pattern stands for, with the hash left out."""
    (path,) = folder.glob(pattern)
    return path.relative_to(folder).as_posix()


# -- hostile manifests -----------------------------------------------------------------------------


def edited(folder, edit):
    """Change the manifest's JSON in place, with the checksum that belongs to it."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(signed(content))
    return folder


def small_bundle(folder, edit=lambda content: None):
    """The hand-made manifest alone: enough for what is refused before any file is read."""
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_bytes(GOLDEN.read_bytes())
    return edited(folder, edit)


def refusal(kind, folder, **options):
    with pytest.raises(kind) as caught:
        Bundle.open(folder, **options)
    assert type(caught.value) is kind
    return str(caught.value)


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path):
    text = refusal(BundleFormatError, tmp_path)
    assert f"Expected a bundle with manifest.json at {tmp_path}, found none." in text
    assert "run blockcache compile again to resume it" in text


def test_a_missing_folder_is_no_bundle(tmp_path):
    assert "found none" in refusal(BundleFormatError, tmp_path / "absent")


def test_a_manifest_that_is_not_json_is_damaged(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format": "blockcache-bu')
    text = refusal(BundleFormatError, tmp_path)
    assert text.startswith(f"Expected JSON in {tmp_path / 'manifest.json'}, got Unterminated")
    assert text.endswith("The file is damaged: compile again.")


def test_a_manifest_that_is_not_text_is_damaged(tmp_path):
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe\x00")
    refusal(BundleFormatError, tmp_path)


def test_a_manifest_nested_too_deep_is_damaged(tmp_path):
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    refusal(BundleFormatError, tmp_path)


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"format": "safetensors", "version": 1}'])
def test_another_format_is_refused_by_name(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    assert refusal(BundleFormatError, tmp_path) == (
        f"Expected a blockcache-bundle manifest, {tmp_path / 'manifest.json'} is something else."
    )


@pytest.mark.parametrize("version", [0, 3, 5, "4", None])
def test_another_version_is_refused_with_both_versions(tmp_path, version):
    folder = small_bundle(tmp_path, lambda content: content.update(version=version))
    text = refusal(BundleFormatError, folder)
    assert "Expected bundle format version 4" in text
    assert f"has version {version}." in text
    assert "Compile the model again with this blockcache, or install the version" in text


def set_path(*path, to):
    """An edit that sets one entry of the manifest."""

    def edit(content):
        *parents, last = path
        for key in parents:
            content = content[key]
        content[last] = to

    return edit


def drop(*path):
    """An edit that removes one entry of the manifest."""

    def edit(content):
        *parents, last = path
        for key in parents:
            content = content[key]
        del content[last]

    return edit


FIRST = ("segments", 1, "inputs", 0)  # the sample
PRESET = ("presets", "ddim-4-d0.5")
MALFORMED = {
    "no model": (drop("model"), "an object with 'model' for 'the file'"),
    "no segments": (drop("segments"), "an object with 'segments' for 'the file'"),
    "no recommended preset": (drop("recommended"), "an object with 'recommended' for 'the file'"),
    "a recommended preset that is not there": (
        set_path("recommended", to="dpm-30"), "one of ['ddim-4-d0.5'] for 'recommended', got "
        "'dpm-30'"),
    "a recommended list": (set_path("recommended", to=[]), "for 'recommended', got []"),
    "presets that are text": (set_path("presets", to="abc"), "an object for 'presets', got 'abc'"),
    "no presets": (set_path("presets", to={}), "one of [] for 'recommended'"),
    "unknown key": (set_path("colour", to="red"), "no such field for 'colour', got 'red'"),
    "segment without role": (drop("segments", 0, "role"), "with 'role' for 'segments[0]'"),
    "segment with unknown key": (
        set_path("segments", 0, "colour", to="red"), "no such field for 'segments[0].colour'"),
    "unknown role": (set_path("segments", 0, "role", to="head"), "for 'segments[0].role', got "
                     "'head'"),
    "role that is no text": (set_path("segments", 0, "role", to=None), "'segments[0].role', got "
                             "None"),
    "trunk with an index": (set_path("segments", 1, "block", to=0), "'segments[1]' is wrong. "
                            "Segment 'trunk_00': a block, and only a block, has an index."),
    "negative index": (set_path("segments", 2, "block", to=-1), "'segments[2].block', got -1"),
    "index that is true": (set_path("segments", 2, "block", to=True), "'segments[2].block', got "
                           "True"),
    "unknown dtype": (set_path(*FIRST, "dtype", to="float8"), "'segments[1].inputs[0].dtype', "
                      "got 'float8'"),
    "dimension that is code": (set_path(*FIRST, "dims", to=["__import__('os')"]),
                               "'segments[1].inputs[0].dims[0]' is wrong. Expected a dimension"),
    "dimension over zero": (set_path(*FIRST, "dims", to=["height/0"]),
                            "'segments[1].inputs[0].dims[0]' is wrong."),
    "dimension in other words": (set_path(*FIRST, "dims", to=["width*height"]),
                                 "expected the dimension 'height*width', written so"),
    "dimension that is a half": (set_path(*FIRST, "dims", to=[0.5]), "dims[0]', got 0.5"),
    "dimension of absurd size": (set_path(*FIRST, "dims", to=[10**30]), "dims[0]', got 1000000"),
    "dims that are no list": (set_path(*FIRST, "dims", to=3), "a list for "
                              "'segments[1].inputs[0].dims', got 3"),
    "segments that are no list": (set_path("segments", to=7), "a list for 'segments', got 7"),
    "files that are a list": (set_path("files", to=["a"]), "an object for 'files', got ['a']"),
    "file without sha256": (drop("files", f"{CONTENT}/trunk_00.onnx", "sha256"), "with 'sha256' "
                            f"for 'files.{CONTENT}/trunk_00.onnx'"),
    "file of a fraction of bytes": (
        set_path("files", f"{CONTENT}/trunk_00.onnx", "bytes", to=1.5), "trunk_00.onnx.bytes'"),
    "hash in capitals": (
        set_path("files", f"{CONTENT}/trunk_00.onnx", "sha256", to="AB" * 32), "hexadecimal"),
    "preset without solver": (drop(*PRESET, "solver"), "with 'solver' for 'presets.ddim-4-d0.5'"),
    "guidance that is text": (set_path(*PRESET, "guidance_scale", to="5"), "guidance_scale'"),
    "guidance of absurd size": (set_path(*PRESET, "guidance_scale", to=1e300), "guidance_scale'"),
    "provenance of an unknown kind": (
        set_path(*PRESET, "provenance", "colour", to=1), "'presets.ddim-4-d0.5.provenance' is "
        "wrong. Expected only fields of"),
    "a training of absurd length": (
        set_path(*PRESET, "solver", to={"solver": "ddim", "steps": 4, "noise":
                 {"train_timesteps": 10**9}}), "'presets.ddim-4-d0.5.solver.noise.train_timesteps'"
        ", got 1000000000"),
    "betas that are text": (
        set_path(*PRESET, "solver", to={"solver": "ddim", "steps": 4, "noise":
                 {"train_timesteps": 1000, "trained_betas": ["x"]}}), "trained_betas[0]', got 'x'"),
    "block without channels": (drop("model", "blocks", 0, "channels"), "with 'channels' for "
                               "'model.blocks[0]'"),
    "sizes that are null": (set_path("model", "sizes", "height", to=None), "'model.sizes.height'"
                            ", got None"),
    "sizes of absurd size": (set_path("model", "sizes", "width", to=10**9), "'model.sizes.width'"),
    "a name for the terminal": (set_path("model", "name", to="\x1b[2J"), "'model.name', got "),
    "a precision of ours to come": (set_path("model", "precision", to="float8"), "for "
                                    "'model.precision', got 'float8'"),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "reason"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_field_is_refused_by_name(tmp_path, edit, reason):
    text = refusal(BundleFormatError, small_bundle(tmp_path, edit))
    assert text.startswith(f"{tmp_path / 'manifest.json'}: ")
    assert reason in text
    assert text.endswith(" Compile the model again.")


def test_a_manifest_that_was_altered_is_refused(tmp_path):
    path = small_bundle(tmp_path) / "manifest.json"
    path.write_text(path.read_text().replace('"height": 16', '"height": 24'))
    assert refusal(BundleFormatError, tmp_path) == (
        f"The content of {path} does not match its own checksum: it was altered. Copy the bundle "
        f"again or compile again."
    )


@given(st.data())
def test_no_flipped_bit_of_a_manifest_is_accepted(data):
    content = bytearray(GOLDEN.read_bytes())
    place = data.draw(st.integers(0, 8 * len(content) - 1))
    content[place // 8] ^= 1 << place % 8
    with pytest.raises(BundleFormatError):
        Manifest.from_json(bytes(content))


def test_a_manifest_in_other_words_is_not_the_same(tmp_path):
    """What JSON takes for equal is refused too: the checksum holds for every bit."""
    path = small_bundle(tmp_path) / "manifest.json"
    for before, after in ((" ", "  "), ("0.625", "0.6250"), ("5.0", "5.0e0"), ('"w', '"\\u0077')):
        text = GOLDEN.read_text()
        assert before in text
        path.write_text(text.replace(before, after, 1))
        assert "does not match its own checksum" in refusal(BundleFormatError, tmp_path)


def test_a_file_that_is_named_but_not_listed_is_refused(tmp_path):
    for name in (
        f"{CONTENT}/block_00.onnx",
        f"{CONTENT}/weights.bin",
        "presets/ddim-4-d0.5-cdcdcdcdcdcd.safetensors",
    ):
        text = refusal(BundleFormatError, small_bundle(tmp_path, drop("files", name)))
        assert text == (
            f"manifest.json names ['{name}'] without a size and sha256. Compile the model again."
        )


# -- hostile paths ---------------------------------------------------------------------------------

ESCAPES = ["/etc/passwd", "../outside", "segments/../../outside", "segments\\..\\..\\x", ".", ""]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_path_out_of_the_bundle_is_refused(tmp_path, name):
    entry = {"bytes": 1, "sha256": "00" * 32}
    folder = small_bundle(tmp_path, lambda content: content["files"].update({name: entry}))
    for verify in (True, False):
        assert refusal(BundlePathError, folder, verify=verify) == (
            f"Expected a path inside the bundle, got {name!r}. Do not use this bundle: its "
            f"manifest was tampered with."
        )


def test_a_segment_out_of_the_bundle_is_refused(tmp_path):
    def edit(content):
        for segment in content["segments"]:
            segment["file"] = segment["file"].replace(CONTENT, "segments/../../outside")
        for name in [name for name in content["files"] if name.startswith(CONTENT)]:
            moved = name.replace(CONTENT, "segments/../../outside")
            content["files"][moved] = content["files"].pop(name)

    text = refusal(BundlePathError, small_bundle(tmp_path, edit))
    assert "got 'segments/../../outside/" in text


def test_a_preset_out_of_the_bundle_is_refused(tmp_path):
    def edit(content):
        content["presets"]["ddim-4-d0.5"]["file"] = "/outside"
        content["files"]["/outside"] = {"bytes": 1, "sha256": "00" * 32}

    assert "got '/outside'" in refusal(BundlePathError, small_bundle(tmp_path, edit))


def test_a_link_out_of_the_bundle_is_refused(bundle_copy):
    name = found(bundle_copy, "segments/*/weights.bin")
    weights = bundle_copy / name
    outside = bundle_copy.parent / "weights.bin"
    weights.rename(outside)
    weights.symlink_to(outside)
    text = refusal(BundlePathError, bundle_copy)
    assert text.startswith(f"{name!r} links to {outside}, outside the bundle.")
    assert text.endswith("Copy the file into the bundle or compile again.")


def test_a_linked_folder_out_of_the_bundle_is_refused(bundle_copy):
    outside = bundle_copy.parent / "elsewhere"
    (bundle_copy / "segments").rename(outside)
    (bundle_copy / "segments").symlink_to(outside)
    assert "outside the bundle" in refusal(BundlePathError, bundle_copy)


def test_a_bundle_may_be_reached_through_a_link(compiled, tmp_path):
    _, bundle = compiled("sd")
    link = tmp_path / "link"
    link.symlink_to(bundle.folder)
    assert Bundle.open(link).manifest == bundle.manifest


def test_a_path_with_a_nul_byte_is_refused(tmp_path):
    with pytest.raises(BundlePathError):
        safe_path(tmp_path, "segments/a\0b")


# -- damaged files ---------------------------------------------------------------------------------

FILES = ["segments/*/trunk_00.onnx", "segments/*/weights.bin", "presets/dpm-20-*.safetensors"]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(bundle_copy, name):
    name = found(bundle_copy, name)
    (bundle_copy / name).unlink()
    for verify in (True, False):
        assert refusal(BundleIntegrityError, bundle_copy, verify=verify) == (
            f"Expected {name} in the bundle, it is missing. Copy the whole folder or compile again."
        )


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named_with_both_sizes(bundle_copy, name):
    name = found(bundle_copy, name)
    path = bundle_copy / name
    size = path.stat().st_size
    os.truncate(path, size - 1)
    for verify in (True, False):
        assert refusal(BundleIntegrityError, bundle_copy, verify=verify) == (
            f"Expected {size} bytes in {name}, got {size - 1}: the file is truncated or was "
            f"replaced. Copy the bundle again or compile again."
        )


def flip_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
def test_an_altered_byte_is_found(bundle_copy, name):
    name = found(bundle_copy, name)
    flip_last_byte(bundle_copy / name)
    assert refusal(BundleIntegrityError, bundle_copy) == (
        f"The content of {name} does not match its sha256 in manifest.json: it was altered. "
        f"Copy the bundle again or compile again."
    )


@pytest.mark.parametrize("name", FILES)
def test_without_verification_only_the_weights_go_unread(bundle_copy, name):
    """Graphs and tables are small and decide what runs: they are always read and checked."""
    name = found(bundle_copy, name)
    flip_last_byte(bundle_copy / name)
    if name.endswith("weights.bin"):
        assert Bundle.open(bundle_copy, verify=False).folder == bundle_copy
    else:
        text = refusal(BundleIntegrityError, bundle_copy, verify=False)
        assert text.startswith(f"The content of {name} does not match its sha256")


def test_a_file_entry_is_size_and_sha256(tmp_path):
    content = os.urandom(5_000_000)  # more than one chunk
    (tmp_path / "f").write_bytes(content)
    entry = FileEntry(5_000_000, hashlib.sha256(content).hexdigest())
    assert FileEntry.of(tmp_path / "f") == entry
    assert hash_files(tmp_path, ["f"]) == {"f": entry}


# -- presets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["dpm-20", "dpm:20"])
def test_a_preset_is_found_by_both_spellings(compiled, spelling):
    _, bundle = compiled("sd")
    assert bundle.preset(spelling).name == "dpm-20"


@pytest.mark.parametrize("name", ["dpm-30", "", 3, ["ddim-4"]])
def test_an_unknown_preset_lists_the_known_ones(compiled, name):
    _, bundle = compiled("sd")
    with pytest.raises(UnknownPresetError) as caught:
        bundle.preset(name)
    assert str(caught.value) == (
        f"Expected a preset of ['ddim-4', 'dpm-20'], got {name!r}. Add one with blockcache "
        f"compile --preset."
    )


def rewrite_preset(folder, change, name="ddim-4"):
    """Change a preset's tables and sign the result, as an attacker or a bug would."""
    file = found(folder, f"presets/{name}-*.safetensors")
    tensors = read_tensors(folder / file)
    change(tensors)
    write_tensors(folder / file, tensors)
    entry = FileEntry.of(folder / file).__dict__
    return edited(folder, lambda content: content["files"].update({file: entry}))


UNFIT = {
    "no schedule": (lambda t: t.pop("recompute"), "the table 'recompute' is missing."),
    "step 0 reuses": (lambda t: t["recompute"].__setitem__((0, 1), 0), "Step 0 must recompute"),
    "a schedule of twos": (lambda t: t["recompute"].__setitem__((1, 1), 2),
                           "recompute: expected 0 and 1 as uint8, got uint8."),
    "a schedule of floats": (
        lambda t: t.update(recompute=t["recompute"].astype(np.float32)),
        "recompute: expected 0 and 1 as uint8, got float32."),
    "one step more": (
        lambda t: t.update(recompute=np.ones((5, t["recompute"].shape[1]), np.uint8)),
        "Alignment of block 0 has 4 steps, the schedule has 5.",
    ),
    "no alignment of block 1": (lambda t: t.pop("alignment.1"), "'alignment.1' is missing."),
    "alignment of two shapes": (
        lambda t: t.update({"alignment.0": np.ones((4, 32), np.float32)}),
        "Alignment tables are float32",
    ),
    "alignment of a recomputed step": (
        lambda t: t.update({"alignment.0": 2 * t["alignment.0"]}),
        "changes a recomputed output",
    ),
    "alignment in integers": (
        lambda t: t.update({"alignment.0": t["alignment.0"].astype(np.int32)}),
        "alignment.0: expected a float32 table with a row a step, got int32 [4, 2, 32].",
    ),
    "alignment with a NaN": (
        lambda t: t["alignment.0"].__setitem__((1, 1, 3), np.nan),
        "alignment.0: 1 of 256 numbers are NaN or infinite.",
    ),
    "time with infinity": (
        lambda t: t["time.time_row_0"].__setitem__((1, 1), np.inf),
        "time.time_row_0: 1 of 128 numbers are NaN or infinite.",
    ),
    "time in halves": (
        lambda t: t.update({"time.time_row_0": t["time.time_row_0"].astype(np.float16)}),
        "time.time_row_0: expected a float32 table with a row a step, got float16 [4, 32].",
    ),
    "short time table": (
        lambda t: t.update({"time.time_row_0": t["time.time_row_0"][:3]}),
        "'time_row_0' has 3 rows, expected one a step (4)",
    ),
    "a table of another name": (
        lambda t: t.update({"extra": t["time.time_row_0"]}),
        "extra: expected no table of this name.",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), UNFIT.values(), ids=UNFIT.keys())
def test_tables_that_do_not_fit_together_are_refused(bundle_copy, change, reason):
    text = refusal(BundleFormatError, rewrite_preset(bundle_copy, change))
    assert text.startswith("The tables of preset 'ddim-4' do not fit together: ")
    assert reason in text
    assert text.endswith("Compile again.")


def test_tables_in_the_file_of_other_ones_are_refused(bundle_copy):
    """Two presets of as many steps may have tables that fit in each other's place."""

    def nudge(tensors):
        tensors["time.time_row_0"][1, 0] += 1

    file = found(bundle_copy, "presets/ddim-4-*.safetensors")
    text = refusal(BundleFormatError, rewrite_preset(bundle_copy, nudge))
    assert text.startswith("Preset 'ddim-4': expected its tables in ddim-4-")
    assert text.endswith(f".safetensors, got {file}. Compile the model again.")


@pytest.mark.parametrize("content", [b"", b"\x80\x04 pickled", b"\xff" * 100])
def test_a_preset_that_is_no_safetensors_file_is_refused(bundle_copy, content):
    file = found(bundle_copy, "presets/ddim-4-*.safetensors")
    (bundle_copy / file).write_bytes(content)
    entry = FileEntry.of(bundle_copy / file).__dict__
    edited(bundle_copy, lambda c: c["files"].update({file: entry}))
    text = refusal(BundleIntegrityError, bundle_copy)
    assert text.startswith(f"Expected a safetensors file at {file}, got: ")
    assert text.endswith("Compile again.")


def test_a_bundle_that_was_replaced_while_it_opened_is_opened_anew(bundle_copy, monkeypatch):
    """A compile switches between the reading of the manifest and of the files that it names."""
    after = (bundle_copy / "manifest.json").read_bytes()
    content = json.loads(after)
    gone = {"bytes": 3, "sha256": "ab" * 32}
    before = signed({**content, "files": {**content["files"], "presets/old": gone}}).encode()
    read = iter([before, after, after])
    monkeypatch.setattr(bundle_module, "_manifest_bytes", lambda root: next(read))
    assert Bundle.open(bundle_copy).manifest.to_json().encode() == after


# -- between opening and use -----------------------------------------------------------------------


def test_a_preset_is_drawn_as_it_was_checked(bundle_copy):
    bundle = Bundle.open(bundle_copy)
    before = {k: v.copy() for k, v in bundle.preset("ddim-4").time_tables.items()}
    path = bundle_copy / found(bundle_copy, "presets/ddim-4-*.safetensors")
    write_tensors(path, {k: v + v for k, v in read_tensors(path).items()})
    session = Session.open(bundle, preset="ddim-4", backend="empty")
    for name, table in before.items():
        np.testing.assert_array_equal(session.preset.time_tables[name], table)


@pytest.mark.parametrize("name", ["segments/*/trunk_00.onnx", "segments/*/weights.bin"])
def test_a_file_replaced_after_opening_is_not_loaded(bundle_copy, name):
    name = found(bundle_copy, name)
    bundle = Bundle.open(bundle_copy)
    path = bundle_copy / name
    replaced = path.with_name("replaced")
    replaced.write_bytes(path.read_bytes())
    replaced.replace(path)
    with pytest.raises(BundleIntegrityError) as caught:
        Session.open(bundle, preset="ddim-4", backend="empty")
    assert str(caught.value) == (
        f"Expected {name} as it was when the bundle was opened, it was replaced or written to "
        f"since. Open the bundle again."
    )


def test_a_profile_is_read_as_the_manifest_has_it(bundle_copy):
    name = found(bundle_copy, "presets/ddim-4-*.safetensors")
    bundle = Bundle.open(bundle_copy)
    assert bundle.tensors(name).keys() == read_tensors(bundle_copy / name).keys()
    flip_last_byte(bundle_copy / name)
    with pytest.raises(BundleIntegrityError, match="does not match its sha256"):
        bundle.tensors(name)
