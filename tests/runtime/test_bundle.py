"""The bundle on disk: golden bytes, round trip, and every way in which it can be hostile."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

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
from blockcache.runtime.bundle import (
    FileEntry,
    PresetEntry,
    hash_files,
    read_preset,
    read_tensors,
    safe_path,
    write_preset,
    write_tensors,
)
from blockcache.runtime.plan import BlockFacts, Dim, ModelFacts, Sizes
from blockcache.runtime.provenance import Provenance

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "manifest.json"


def spec(name, *sizes, dtype="float32"):
    return TensorSpec(name, dtype, tuple(Dim.parse(size) for size in sizes))


def small_manifest():
    """Two trunks and a block, by hand."""
    x = ("batch", 4, "height", "width")
    segments = (
        Segment("trunk_00", "trunk", "trunk_00.onnx", (spec("sample", *x),),
                (spec("trunk_0_0", "batch", 8, "height/2", "width/2"),), flops=1200),
        Segment("block_00", "block", "block_00.onnx",
                (spec("trunk_0_0", "batch", 8, "height/2", "width/2"),
                 spec("prompt_0", "batch", "height*width/4", "tokens", 8)),
                (spec("block_0", "batch", 8, "height/2", "width/2"),), block=0, flops=3400),
        Segment("trunk_01", "trunk", "trunk_01.onnx",
                (spec("trunk_0_0", "batch", 8, "height/2", "width/2"),
                 spec("block_0", "batch", 8, "height/2", "width/2"),
                 spec("scale_0", 1, 8, 1, 1), spec("shift_0", 1, 8, 1, 1)),
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
    )
    solver, policy = {"solver": "ddim", "steps": 4}, Provenance(kind="threshold", value=0.5)
    preset = PresetEntry("presets/ddim-4-d0.5.safetensors", 4, 0.625, 5.0, solver, policy)
    files = {f"segments/{s.file}": FileEntry(100 + i, f"{i:064x}") for i, s in enumerate(segments)}
    files |= {preset.file: FileEntry(77, "cd" * 32)}
    return Manifest(model, segments, {"ddim-4-d0.5": preset}, files, {"export": "ef" * 32})


# -- the format ------------------------------------------------------------------------------------


def test_the_manifest_is_written_byte_for_byte_as_the_golden_file():
    assert small_manifest().to_json().encode() == GOLDEN.read_bytes()


def test_the_golden_file_is_read_back_as_the_manifest():
    assert Manifest.from_json(GOLDEN.read_text()) == small_manifest()


def test_a_real_manifest_survives_a_round_trip(compiled):
    _, bundle = compiled("sd")
    text = (bundle.folder / "manifest.json").read_text()
    assert Manifest.from_json(text).to_json() == text


def test_a_preset_survives_a_round_trip(tmp_path):
    schedule = Schedule(np.array([[1, 1], [0, 1], [1, 0]], bool))
    tables = Alignment.identity(3, (4, 8)).tables
    tables[0][1] = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
    rows = {"time_row_0": np.arange(15, dtype=np.float32).reshape(3, 5)}
    made = Provenance(kind="threshold", value=0.5)
    preset = Preset("p", {"solver": "ddim"}, schedule, Alignment(tables), rows, 2.5, made)
    write_preset(tmp_path / "p.safetensors", preset)
    entry = PresetEntry("p.safetensors", 3, 0.6, 2.5, {"solver": "ddim"}, made)
    read = read_preset(tmp_path / "p.safetensors", "p", entry)
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


# -- hostile manifests -----------------------------------------------------------------------------


def edited(folder, edit):
    """Change the manifest's JSON in place."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
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


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_refused_with_both_versions(tmp_path, version):
    folder = small_bundle(tmp_path, lambda content: content.update(version=version))
    text = refusal(BundleFormatError, folder)
    assert "Expected bundle format version 1" in text
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


MALFORMED = {
    "no model": drop("model"),
    "no segments": drop("segments"),
    "no stages": drop("stages"),
    "segment without role": drop("segments", 0, "role"),
    "segment with unknown key": set_path("segments", 0, "colour", to="red"),
    "unknown role": set_path("segments", 0, "role", to="head"),
    "trunk with an index": set_path("segments", 0, "block", to=0),
    "unknown dtype": set_path("segments", 0, "inputs", 0, "dtype", to="float8"),
    "dimension that is code": set_path("segments", 0, "inputs", 0, "dims", to=["__import__('os')"]),
    "dims that are no list": set_path("segments", 0, "inputs", 0, "dims", to=3),
    "segments that are no list": set_path("segments", to=7),
    "files that are a list": set_path("files", to=["a"]),
    "file without sha256": drop("files", "segments/trunk_00.onnx", "sha256"),
    "preset without solver": drop("presets", "ddim-4-d0.5", "solver"),
    "block without channels": drop("model", "blocks", 0, "channels"),
}


@pytest.mark.parametrize("edit", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_entry_is_refused(tmp_path, edit):
    text = refusal(BundleFormatError, small_bundle(tmp_path, edit))
    assert f"{tmp_path / 'manifest.json'} is malformed: " in text
    assert text.endswith("Compile the model again.")


LEAKING = {
    "dimension over zero": set_path("segments", 0, "inputs", 0, "dims", to=["height/0"]),
    "stages that are text": set_path("stages", to="abc"),
}


@pytest.mark.parametrize("edit", LEAKING.values(), ids=LEAKING.keys())
def test_a_malformed_number_or_table_is_refused(tmp_path, edit):
    folder = small_bundle(tmp_path, edit)
    assert "is malformed" in refusal(BundleFormatError, folder)


def test_a_file_that_is_named_but_not_listed_is_refused(tmp_path):
    for name in ("segments/block_00.onnx", "presets/ddim-4-d0.5.safetensors"):
        text = refusal(BundleFormatError, small_bundle(tmp_path, drop("files", name)))
        assert text == (
            f"manifest.json names ['{name}'] without a size and sha256. Compile the model again."
        )


# -- hostile paths ---------------------------------------------------------------------------------

ESCAPES = ["/etc/passwd", "../outside", "segments/../../outside", "segments\\..\\..\\x", ".", ""]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_path_out_of_the_bundle_is_refused(tmp_path, name):
    entry = {"bytes": 1, "sha256": "00" * 32}
    folder = small_bundle(tmp_path, lambda content: content.update(
        files={name: entry}, segments=[], presets={}))  # fmt: skip
    for verify in (True, False):
        assert refusal(BundlePathError, folder, verify=verify) == (
            f"Expected a path inside the bundle, got {name!r}. Do not use this bundle: its "
            f"manifest was tampered with."
        )


def test_a_segment_out_of_the_bundle_is_refused(tmp_path):
    def edit(content):
        content["segments"][0]["file"] = "../../outside.onnx"
        content["files"]["segments/../../outside.onnx"] = {"bytes": 1, "sha256": "00" * 32}

    text = refusal(BundlePathError, small_bundle(tmp_path, edit))
    assert "got 'segments/../../outside.onnx'" in text


def test_a_preset_out_of_the_bundle_is_refused(tmp_path):
    def edit(content):
        content["presets"]["ddim-4-d0.5"]["file"] = "/outside"
        content["files"]["/outside"] = {"bytes": 1, "sha256": "00" * 32}

    assert "got '/outside'" in refusal(BundlePathError, small_bundle(tmp_path, edit))


def test_a_link_out_of_the_bundle_is_refused(bundle_copy):
    weights = bundle_copy / "segments" / "weights.bin"
    outside = bundle_copy.parent / "weights.bin"
    weights.rename(outside)
    weights.symlink_to(outside)
    text = refusal(BundlePathError, bundle_copy)
    assert text.startswith(f"'segments/weights.bin' links to {outside}, outside the bundle.")
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

FILES = ["segments/trunk_00.onnx", "segments/weights.bin", "presets/dpm-20.safetensors"]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(bundle_copy, name):
    (bundle_copy / name).unlink()
    for verify in (True, False):
        assert refusal(BundleIntegrityError, bundle_copy, verify=verify) == (
            f"Expected {name} in the bundle, it is missing. Copy the whole folder or compile again."
        )


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named_with_both_sizes(bundle_copy, name):
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
    flip_last_byte(bundle_copy / name)
    assert refusal(BundleIntegrityError, bundle_copy) == (
        f"The content of {name} does not match its sha256 in manifest.json: it was altered. "
        f"Copy the bundle again or compile again."
    )


@pytest.mark.parametrize("name", FILES)
def test_without_verification_only_the_content_goes_unread(bundle_copy, name):
    flip_last_byte(bundle_copy / name)
    assert Bundle.open(bundle_copy, verify=False).folder == bundle_copy


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


def test_an_unknown_preset_lists_the_known_ones(compiled):
    _, bundle = compiled("sd")
    with pytest.raises(UnknownPresetError) as caught:
        bundle.preset("dpm-30")
    text = str(caught.value)
    assert re.fullmatch(
        r"Expected a preset of \['ddim-4', 'dpm-20'\], got 'dpm-30'\. "
        r"Add one with blockcache compile --preset\.",
        text,
    )


def rewrite_preset(folder, change, name="ddim-4"):
    """Change a preset's tables and sign the result, as an attacker or a bug would."""
    file = f"presets/{name}.safetensors"
    tensors = read_tensors(folder / file)
    change(tensors)
    write_tensors(folder / file, tensors)
    entry = FileEntry.of(folder / file).__dict__
    edited(folder, lambda content: content["files"].update({file: entry}))
    return Bundle.open(folder)


UNFIT = {
    "no schedule": (lambda t: t.pop("recompute"), "recompute"),
    "step 0 reuses": (lambda t: t["recompute"].__setitem__((0, 1), 0), "Step 0 must recompute"),
    "one step more": (
        lambda t: t.update(recompute=np.ones((5, t["recompute"].shape[1]), np.uint8)),
        "Alignment of block 0 has 4 steps, the schedule has 5.",
    ),
    "no alignment of block 1": (lambda t: t.pop("alignment.1"), "alignment.1"),
    "alignment of two shapes": (
        lambda t: t.update({"alignment.0": np.ones((4, 32), np.float32)}),
        "Alignment tables are float32",
    ),
    "alignment of a recomputed step": (
        lambda t: t.update({"alignment.0": 2 * t["alignment.0"]}),
        "changes a recomputed output",
    ),
    "short time table": (
        lambda t: t.update({"time.time_row_0": t["time.time_row_0"][:3]}),
        "'time_row_0' has 3 rows, expected one a step (4)",
    ),
}


@pytest.mark.parametrize(("change", "reason"), UNFIT.values(), ids=UNFIT.keys())
def test_tables_that_do_not_fit_together_are_refused(bundle_copy, change, reason):
    bundle = rewrite_preset(bundle_copy, change)
    with pytest.raises(BundleFormatError) as caught:
        bundle.preset("ddim-4")
    text = str(caught.value)
    assert text.startswith("The tables of preset 'ddim-4' do not fit together: ")
    assert reason in text
    assert text.endswith("Compile again.")


def test_a_preset_that_is_no_safetensors_file_is_refused(bundle_copy):
    path = bundle_copy / "presets" / "ddim-4.safetensors"
    path.write_bytes(b"\x80\x04 pickled")
    entry = FileEntry.of(path).__dict__
    edited(bundle_copy, lambda c: c["files"].update({"presets/ddim-4.safetensors": entry}))
    with pytest.raises(BundleIntegrityError, match="Expected a safetensors file at") as caught:
        Bundle.open(bundle_copy).preset("ddim-4")
    assert str(caught.value).endswith("Compile again.")


def narrow(tensors):
    tensors["alignment.0"] = np.ascontiguousarray(tensors["alignment.0"][:, :, :-1])


def one_block_less(tensors):
    last = tensors["recompute"].shape[1] - 1
    tensors["recompute"] = np.ascontiguousarray(tensors["recompute"][:, :last])
    del tensors[f"alignment.{last}"]


FOREIGN = {
    "time table missing": lambda t: t.pop("time.time_row_0"),
    "time table too narrow": lambda t: t.update({"time.time_row_0": np.zeros((4, 3), np.float32)}),
    "alignment too narrow": narrow,
    "one block less": one_block_less,
}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN.keys())
def test_tables_that_do_not_fit_the_model_are_refused(bundle_copy, change):
    bundle = rewrite_preset(bundle_copy, change)

    def use():
        session = Session.open(bundle, preset="ddim-4", backend="empty")
        session.denoise(session.noise([0]), np.zeros((1, 7, 32), np.float32), guidance_scale=1)

    with pytest.raises(BundleFormatError):
        use()


def test_a_solver_of_other_steps_than_the_schedule_is_refused(bundle_copy):
    edited(bundle_copy, set_path("presets", "ddim-4", "solver", "steps", to=9))
    with pytest.raises(BundleFormatError):
        Session.open(bundle_copy, preset="ddim-4", backend="empty")


def test_a_preset_of_other_outputs_than_the_segments_is_refused(bundle_copy):
    def with_history(tensors):
        for name in [name for name in tensors if name.startswith("alignment.")]:
            steps, _, channels = tensors[name].shape
            tensors[name] = Alignment.identity(steps, (channels,), 2).tables[0]

    bundle = rewrite_preset(bundle_copy, with_history)
    with pytest.raises(BundleFormatError) as caught:
        Session.open(bundle, preset="ddim-4", backend="empty")
    assert str(caught.value) == (
        "Preset 'ddim-4' combines 2 outputs of a block, the bundle's segments 1. "
        "Compile the preset again."
    )
