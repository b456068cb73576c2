"""Contradictions between a bundle's parts, with right hashes: each is refused by name."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest

from blockcache.runtime import (
    Bundle,
    BundleFormatError,
    BundleIntegrityError,
    BundlePathError,
    Session,
)
from blockcache.runtime.bundles.manifest import FileEntry, signed
from blockcache.runtime.engines.empty import EmptyBackend
from blockcache.runtime.engines.loading import load_shared

onnx = pytest.importorskip("onnx")


def sign(folder, edit=lambda content: None):
    """Edit the manifest, then make its checksum and the hashes of all files again."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    edit(content)
    for name in content["files"]:
        content["files"][name] = asdict(FileEntry.of(folder / name))
    path.write_text(signed(content))
    return folder


def refusal(folder, kind=BundleFormatError):
    with pytest.raises(kind) as caught:
        Bundle.open(folder)
    return str(caught.value)


def segment(content, name):
    return next(entry for entry in content["segments"] if entry["name"] == name)


def tensor(content, name, side, at=0):
    return segment(content, name)[side][at]


def place(content, name):
    return content["segments"].index(segment(content, name))


# -- segments --------------------------------------------------------------------------------------


def swap(one, other):
    def edit(content):
        entries = content["segments"]
        i, j = place(content, one), place(content, other)
        entries[i], entries[j] = entries[j], entries[i]

    return edit


def swap_indices(content):
    segment(content, "block_01")["block"] = 2
    segment(content, "block_02")["block"] = 1


def remove(name):
    return lambda content: content["segments"].remove(segment(content, name))


def role(name, to):
    return lambda content: segment(content, name).update(role=to)


def output_of(**changes):
    return lambda content: tensor(content, "trunk_07", "outputs").update(changes)


def rename(content):
    tensor(content, "trunk_01", "inputs").update(name="block_x")


def write_twice(content):
    tensor(content, "trunk_02", "outputs").update(name="trunk_1_0")


CONTRADICTIONS = {
    "no segments": (
        lambda c: c.update(segments=[]), "segments: expected the blocks [0, 1, 2, 3, 4, 5, 6] in "
        "this order, got []."),
    "trunks out of order": (
        swap("trunk_01", "trunk_02"), "Segment 'trunk_02', input 'block_1': expected a tensor "
        "written before, got one that is not."),
    "blocks out of order": (
        swap("block_01", "block_02"), "segments: expected the blocks [0, 1, 2, 3, 4, 5, 6] in this "
        "order, got [0, 2, 1, 3, 4, 5, 6]."),
    "block indices swapped": (swap_indices, "got [0, 2, 1, 3, 4, 5, 6]."),
    "a block that is gone": (remove("block_03"), "got [0, 1, 2, 4, 5, 6]."),
    "a trunk that is gone": (
        remove("trunk_03"), "Segment 'block_03', input 'trunk_3_0': expected a tensor written "
        "before"),
    "the end that is gone": (
        remove("trunk_07"), "segments: expected one to write model_output, got none."),
    "no prompt segment": (
        remove("prompt"), "Segment 'block_00', input 'prompt_0': expected a tensor written before"),
    "no time segment": (
        remove("time"), "Segment 'trunk_00', input 'time_row_0': expected a tensor written before"),
    "a trunk that runs once": (
        role("trunk_02", "prompt"), "Segment 'trunk_02', input 'block_1': expected a tensor "
        "written before"),
    "a prompt segment in the loop": (
        role("prompt", "trunk"), "Segment 'prompt': expected role 'trunk' to read a tensor of kind "
        "sample"),
    "a prompt segment for each step": (
        role("prompt", "condition"), "role 'condition' to read a tensor of kind row or both"),
    "a time segment for each step": (
        role("time", "condition"), "Preset 'ddim-4': expected tables for ['scale_0', "),
    "two whole models": (
        role("trunk_00", "whole"), "segments: expected at most one of role 'whole', got 2."),
    "a segment in another folder": (
        lambda c: segment(c, "trunk_01").update(file="segments/other/trunk_01.onnx"),
        "segments: expected files in one folder, with their weights, got ['segments/"),
    "a name twice": (
        lambda c: segment(c, "trunk_01").update(name="trunk_02"), "segments: expected each name "
        "and file once, got ['trunk_02'] again."),
    "a file twice": (
        lambda c: segment(c, "trunk_01").update(file=segment(c, "trunk_02")["file"]),
        "segments: expected each name and file once, got ["),
    "a tensor that nothing writes": (
        rename, "Segment 'trunk_01', input 'block_x': expected a tensor written before"),
    "a tensor written twice": (
        write_twice, "Segment 'trunk_02': expected to write tensors of new names, got 'trunk_1_0' "
        "again."),
    "an output of another dtype": (
        output_of(dtype="float16"), "expected the output model_output float32 [batch, 4, height, "
        "width], got model_output float16 [batch, 4, height, width]."),
    "an output of another shape": (
        output_of(dims=["batch", 8, "height", "width"]), "got model_output float32 [batch, 8, "
        "height, width]."),
    "latent channels that are others": (
        lambda c: (c["model"].update(channels=8),
                   c["unet_config"].update(in_channels=8, out_channels=8)),
        "expected sample float32 [batch, 8, height, width], got sample float32 [batch, 4, height, "
        "width]."),
    "a config of other channels": (
        lambda c: c["unet_config"].update(in_channels=9), "expected 4, as model.channels for "
        "'unet_config.in_channels', got 9."),
    "an extra input that is no condition": (
        lambda c: c["model"].update(extra_inputs=["mask"]), "expected one of [] for "
        "'model.extra_inputs[0]', got 'mask'."),
    "an extra input that is no picture of the sample's size": (
        lambda c: (c["model"]["conditions"].append(
            {"name": "mask", "dtype": "float32", "dims": ["batch", 1, "height", "2*width"]}),
                   c["model"].update(extra_inputs=["mask"])),
        "expected one of [] for 'model.extra_inputs[0]', got 'mask'."),
    "an extra input of more channels than the config has": (
        lambda c: (c["model"]["conditions"].append(
            {"name": "mask", "dtype": "float32", "dims": ["batch", 1, "height", "width"]}),
                   c["model"].update(extra_inputs=["mask"])),
        "expected 5, as model.channels with extra_inputs for 'unet_config.in_channels', got 4."),
    "a config without channels": (
        lambda c: c["unet_config"].pop("out_channels"), "expected an object with 'out_channels' "
        "for 'unet_config'"),
    "a block of another width": (
        lambda c: c["model"]["blocks"][2].update(channels=32), "Segment 'block_02': expected an "
        "output [batch, 32, ...], got block_2 float32 [batch, 64, height/4, width/4]."),
    "a dimension of 10^9": (
        lambda c: tensor(c, "trunk_00", "outputs").update(dims=["batch", 10**9, "height"]),
        "Tensor 'trunk_0_0': expected at most 17179869184 bytes at batch 2, height 16, width 16, "
        "tokens 7, got 128000000000."),
    "sizes that the model cannot have": (
        lambda c: c["model"]["sizes"].update(height=18), "must be a whole number; it is 9/2 for "
        "batch 2, height 18, width 16, tokens 7."),
    "history that the segments lack": (
        lambda c: c["model"].update(outputs=2), "segments: expected every tensor to be read, got "
        "none for ['before_0', "),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "reason"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_segments_that_do_not_make_the_model_are_refused(bundle_copy, edit, reason):
    assert reason in refusal(sign(bundle_copy, edit))


# -- graphs ----------------------------------------------------------------------------------------


def change_graph(folder, name, change):
    path = Bundle.open(folder).segment_path(
        next(s for s in Bundle.open(folder).segments if s.name == name)
    )
    model = onnx.load(path, load_external_data=False)
    change(model.graph)
    path.write_bytes(model.SerializeToString())
    return sign(folder)


def set_place(key, value):
    def change(graph):
        weight = next(w for w in graph.initializer if w.data_location == 1)
        next(e for e in weight.external_data if e.key == key).value = value

    return change


GRAPHS = {
    "another input": (
        lambda g: setattr(g.input[0], "name", "other"), "Segment 'trunk_01', inputs: expected ["),
    "another dtype": (
        lambda g: setattr(g.output[0].type.tensor_type, "elem_type", 10), "Segment 'trunk_01', "
        "outputs: expected trunk_1_0 float16 [batch, 32, height, width], got trunk_1_0 float32"),
    "another dimension": (
        lambda g: setattr(g.input[0].type.tensor_type.shape.dim[1], "dim_value", 10**9),
        "expected block_0 float32 [batch, 1000000000, height, width], got block_0 float32 [batch, "
        "32, height, width]."),
    "weights of the system": (set_place("location", "/etc/passwd"), "expected a file of ["),
    "weights above": (set_place("location", "../weights.bin"), "got ../weights.bin."),
    "weights that are a graph": (set_place("location", "block_00.onnx"), "got block_00.onnx."),
    "weights behind the end": (set_place("offset", str(10**12)), "of weights.bin, got up to 1000"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), GRAPHS.values(), ids=GRAPHS.keys())
def test_a_graph_that_contradicts_the_manifest_is_refused(bundle_copy, change, reason):
    assert reason in refusal(change_graph(bundle_copy, "trunk_01", change))


def test_two_graphs_that_change_places_are_refused(bundle_copy):
    bundle = Bundle.open(bundle_copy)
    names = ("block_02", "block_03")
    one, other = (bundle.segment_path(s) for s in bundle.segments if s.name in names)
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])
    assert "Segment 'block_02', inputs: expected [" in refusal(sign(bundle_copy))


# -- presets ---------------------------------------------------------------------------------------


def preset(**changes):
    return lambda content: content["presets"]["ddim-4"].update(changes)


def solver(**changes):
    return lambda content: content["presets"]["ddim-4"]["solver"].update(changes)


PRESETS = {
    "a profile that is not listed": (
        lambda c: c["presets"]["ddim-4"]["provenance"].update(profile="profiles/x.safetensors"),
        "manifest.json names ['profiles/x.safetensors'] without a size and sha256."),
    "steps that are others": (preset(steps=5), "expected 5 steps in its schedule, got 4."),
    "less computed than said": (preset(computed_fraction=0.5), "expected computed_fraction 0.5, "
                                "got 1.000000."),
    "another preset's tables": (
        lambda c: c["presets"]["ddim-4"].update(file=c["presets"]["dpm-20"]["file"]),
        "the solver takes 4 steps, the schedule has 20."),
    "a solver that does not exist": (solver(solver="heun"), "Preset 'ddim-4', solver: "),
    "a solver of other steps": (solver(steps=9), "the solver takes 9 steps, the schedule has 4."),
    "an option left out": (
        lambda c: c["presets"]["ddim-4"]["solver"].pop("set_alpha_to_one"), "Preset 'ddim-4', "
        "solver: expected every option written: {'solver': 'ddim', "),
    "options that the solver lacks": (solver(colour="red"), "Preset 'ddim-4', solver: "),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "reason"), PRESETS.values(), ids=PRESETS.keys())
def test_a_preset_that_contradicts_its_line_is_refused(bundle_copy, edit, reason):
    assert reason in refusal(sign(bundle_copy, edit))


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["manifest.json", "segments/*/trunk_00.onnx"])
def test_a_link_to_itself_is_refused(bundle_copy, name):
    (path,) = bundle_copy.glob(name)
    name = path.relative_to(bundle_copy).as_posix()
    path.unlink()
    path.symlink_to(path.name)
    text = refusal(bundle_copy, BundlePathError)
    assert text.startswith(f"Expected a file at {name!r}, got links that lead in a circle.")


def test_a_file_that_cannot_be_read_says_why(bundle_copy, monkeypatch):
    (path,) = bundle_copy.glob("segments/*/trunk_00.onnx")
    path.unlink()
    path.mkdir()
    text = refusal(bundle_copy, BundleIntegrityError)
    assert text.startswith(f"Expected {path.relative_to(bundle_copy)} in the bundle, it ")


def test_a_snapshot_of_the_hub_opens(bundle_copy, tmp_path):
    """There every file is a link to the cache's blobs."""
    snapshot = tmp_path / "models--maker--model" / "snapshots" / "abc"
    blobs = tmp_path / "models--maker--model" / "blobs"
    blobs.mkdir(parents=True)
    for path in sorted(p for p in bundle_copy.rglob("*") if p.is_file()):
        entry = FileEntry.of(path)
        shutil.copy(path, blobs / entry.sha256)
        link = snapshot / path.relative_to(bundle_copy)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blobs / entry.sha256)
    session = Session.open(snapshot, preset="ddim-4", backend="ort")
    other = Session.open(bundle_copy, preset="ddim-4", backend="ort")
    inputs = (session.noise([0]), np.ones((1, 7, 32), np.float32), np.zeros((1, 7, 32), np.float32))
    np.testing.assert_array_equal(session.denoise(*inputs).latents, other.denoise(*inputs).latents)
    outside = tmp_path / "outside"
    outside.write_bytes(b"x")
    (snapshot / "manifest.json").unlink()
    (snapshot / "manifest.json").symlink_to(outside)
    assert f"links to {outside}, outside the bundle." in refusal(snapshot, BundlePathError)


def test_other_weights_are_other_engines(bundle_copy):
    """A session that opens after the weights changed does not draw with the old ones."""
    backend = EmptyBackend()
    before = Bundle.open(bundle_copy)
    trunk = next(s for s in before.segments if s.name == "trunk_00")
    first = load_shared(backend, before, trunk)
    assert load_shared(backend, Bundle.open(bundle_copy), trunk) is first
    weights = next(bundle_copy / n for n in before.segment_files(trunk) if n.endswith(".bin"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    after = Bundle.open(sign(bundle_copy))
    assert load_shared(backend, after, trunk) is not first
