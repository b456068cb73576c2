"""The command line: the main job through the same door as a user, errors in one line."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("onnxruntime")
pytest.importorskip("diffusers")

from safetensors.numpy import save_file

from blockcache import __version__
from blockcache.runtime import Bundle, DriftMonitor, Session
from blockcache.tools import cli
from blockcache.tools.commands.names import precision_for, warn_of_guidance


@pytest.fixture(scope="module")
def source(tiny_models, conditions_of, tmp_path_factory):
    """A diffusers folder of a tiny model, with a calibration file beside it."""
    model = tiny_models("sd")
    folder = tmp_path_factory.mktemp("source")
    model.unet.save_pretrained(folder / "unet")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(model.scheduler))
    positive, negative = conditions_of(model, 2), conditions_of(model, 1, seed=1)
    tensors = positive | {f"negative.{name}": values for name, values in negative.items()}
    save_file(tensors, folder / "calibration.safetensors")
    return folder


def test_compile_show_run_and_bench_are_one_way(blockcache, source, tmp_path):
    bundle, calibration = tmp_path / "bundle", source / "calibration.safetensors"
    arguments = ["--calibration", calibration, "--profile-prompts", 2, "--profile-seeds", 1]
    presets = ["--preset", "ddim:4:0.2", "--preset", "ddim:4"]
    code, out, err = blockcache("compile", source, bundle, *arguments, *presets, "--json")
    assert code == 0
    facts = json.loads(out)
    assert set(facts["presets"]) == {"ddim-4-d0.2", "ddim-4"}
    assert len(facts["blocks"]) == 7
    assert facts["recommended"] == "ddim-4-d0.2"
    assert facts["presets"]["ddim-4"]["loss"] == 0
    assert facts["presets"]["ddim-4"]["uncached_steps"] == 4
    assert facts["changes"]["added"] == ["ddim-4-d0.2", "ddim-4"]
    assert "evaluations of the U-Net" in err
    assert f"wrote {bundle / 'presets.svg'}" in err
    more = ["--preset", "ddim:2", "--recommend", "ddim:4"]
    code, out, _ = blockcache("compile", source, bundle, *arguments, *more)
    assert code == 0
    assert "added ddim-2; kept ddim-4-d0.2, ddim-4" in out
    assert "* ddim-4 " in out
    theirs = ["--preset", "scheduler:2", "--scheduler", "HeunDiscreteScheduler", *more[2:]]
    code, out, _ = blockcache("compile", source, bundle, *arguments, *theirs)
    assert code == 0
    assert "added HeunDiscreteScheduler-2; kept ddim-4-d0.2, ddim-4, ddim-2" in out
    run = ["run", bundle, "--embeddings", calibration, "--out", tmp_path / "no.npy"]
    code, _, err = blockcache(*run, "--preset", "HeunDiscreteScheduler:2")
    assert code == 1
    assert "Preset 'HeunDiscreteScheduler-2' runs HeunDiscreteScheduler of diffusers, which" in err
    assert "speed-up" in (bundle / "presets.svg").read_text()

    drawn = ["--plot", tmp_path / "schedule.svg", "--plot-change", tmp_path / "new/change.svg"]
    code, out, err = blockcache("show", bundle, "--preset", "ddim:4:0.2", *drawn)
    assert code == 0
    assert "█" in out
    assert "* ddim-4 " in out
    assert "  ddim-4-d0.2 " in out
    assert max(map(len, out.splitlines())) <= 80
    assert err.splitlines() == [f"wrote {drawn[1]}", f"wrote {drawn[3]}"]
    assert (tmp_path / "schedule.svg").read_text().lstrip().startswith("<?xml")

    assert "<path" in (tmp_path / "new/change.svg").read_text()

    latents = tmp_path / "drawn" / "latents.npy"
    run = ["run", bundle, "--embeddings", calibration, "--out", latents, "--json"]
    code, out, _ = blockcache(*run, "--seed", 3)
    assert code == 0
    assert json.loads(out)["steps"] == 4
    first = np.load(latents)
    assert first.shape == (2, 4, 16, 16)
    assert np.isfinite(first).all()
    blockcache(*run, "--seed", 3)
    np.testing.assert_array_equal(np.load(latents), first)
    blockcache(*run, "--seed", 3, "--guidance-rescale", 0.7)
    assert np.abs(np.load(latents) - first).max() > 1e-3
    code, _, err = blockcache(*run, "--guidance-rescale", 2)
    assert code == 1
    assert "guidance_rescale: expected 0 (off) to 1, got 2.0" in err

    monitor = DriftMonitor()  # takes the profile that the compile wrote
    Session.open(bundle, preset="ddim-4-d0.2", backend="empty", drift=monitor)
    assert monitor.report().measured > 0

    folder, timings = tmp_path / "bench", tmp_path / "timings.json"
    wanted = ["--engine", "ort", "--rounds", 1, "--threads", 1, "--out", folder]
    code, out, _ = blockcache("bench", bundle, *wanted, "--timings", timings)
    assert code == 0
    assert "| ort cached ddim-4-d0.2 |" in out
    assert {path.name for path in folder.iterdir()} == {"report.md", "report.json", "latency.svg"}

    code, out, _ = blockcache("estimate", bundle, "--gpu", "a100", "--timings", timings, "--json")
    assert code == 0
    (prediction,) = json.loads(out)
    assert all(row["measured_ms"] > 0 for row in prediction["presets"])

    # Measured on one image, so that a budget may count in them; or predicted, but never both.
    again = ["compile", source, tmp_path / "timed", "--calibration", calibration]
    again += ["--preset", "ddim:4:blocksms1000000", "--profile-prompts", 1, "--profile-seeds", 1]
    code, out, _ = blockcache(*again, "--timings", timings, "--json")
    assert code == 0
    (preset,) = json.loads(out)["presets"]
    counted = Bundle.open(tmp_path / "timed").preset(preset).provenance.costs
    assert counted.endswith(", ort")
    code, _, err = blockcache(*again, "--timings", timings, "--gpu", "a100")
    assert code == 1
    assert "(--timings) or a GPU to predict them for (--gpu), got both." in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "nowhere"], "error: Expected a bundle with manifest.json at nowhere, found none"),
        (["compile", "nowhere", "out"], "error: Expected a diffusers folder or a hub id"),
        (
            ["compile", "demo", "out", "--preset", "dpm"],
            "error: Expected a preset SOLVER[-GRID]:STEPS[:POLICY[:ALIGNMENT]] such as dpm:20:0.5, "
            "dpm:20:x2 or dpm-karras:20, got 'dpm'.",
        ),
        (["compile", "demo", "out", "--preset", "heun:9"], "error: Expected a solver of"),
        (["compile", "demo", "out", "--precision", "int8"], "error: Expected a precision of"),
        (["compile", "demo", "out", "--blocks", "attentions"], "error: Expected blocks of"),
        (
            ["compile", "demo", "out", "--scheduler", "PNDMScheduler", "--preset", "dpm:9"],
            "error: --scheduler PNDMScheduler: expected a preset that runs it, such as --preset "
            "scheduler:20:branch2, got dpm-9.",
        ),
        (["compile", "demo", "out", "--target", "voodoo"], "error: Expected a target such as sm80"),
        (["compile", "demo", "out", "--calibration", "x"], "error: Expected a calibration file at"),
        (["compile", "demo", "out", "--prompts", "x"], "error: Expected a file of prompts at x"),
        (["compile", "demo", "/proc/out"], "error: Expected a folder that can be written at /proc"),
        (["show", "x", "--plot", "x.jpg"], "error: Expected a file that ends in .png or .svg, got"),
        (["run", "x", "--out", "x.jpg"], "error: Expected a file that ends in .png or .npy, got"),
        (["run", "x", "--out", "/proc/new/x.npy"], "error: Expected a folder that can be written"),
        (["estimate", "x", "--gpu", "voodoo"], "error: Expected a GPU of"),
        (["build", "x", "--target", "voodoo"], "error: Expected a target such as sm80"),
        (["compile", "demo", "out", "--gpu", "voodoo"], "error: Expected a GPU of"),
        (
            ["compile", "demo", "out", "--preset", "dpm:20:blocksms250"],
            "error: A preset of so many milliseconds needs times. Give measured ones (blockcache "
            "bench BUNDLE --timings FILE, then --timings FILE here), or a GPU to predict them for "
            "(--gpu a100).",
        ),
    ],
)
def test_expected_errors_are_one_line_and_exit_code_1(
    blockcache, arguments, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    code, out, err = blockcache(*arguments)
    assert code == 1
    assert out == ""
    *progress, last = err.strip().splitlines()
    assert last.startswith(message)
    assert not any("error" in line for line in progress)
    assert "Traceback" not in err


COMMANDS = ("demo", "compile", "run", "show", "build", "check", "bench", "estimate", "evaluate")


def test_names_are_checked_before_anything_heavy_is_imported(tmp_path):
    """A typing error costs a second, not the import of torch."""
    for arguments in (
        ["compile", "demo", "out", "--preset", "heun:9"],
        ["compile", "nowhere", "out"],
        ["compile", "demo", "out", "--precision", "int8"],
        ["build", "nowhere", "--target", "voodoo"],
    ):
        made = in_a_process_without(("torch", "diffusers"), tmp_path, *arguments)
        assert made.stderr.startswith("error: Expected a"), made.stderr


def test_bundles_are_shown_run_and_timed_without_torch(compiled, conditions_of, tmp_path):
    """What the extra ``cli`` is for."""
    model, bundle = compiled("sd")
    positive, negative = conditions_of(model, 1), conditions_of(model, 1, seed=1)
    tensors = positive | {f"negative.{name}": values for name, values in negative.items()}
    save_file(tensors, tmp_path / "prompts.safetensors")
    absent = ("torch", "diffusers", "transformers", "onnx", "onnx_ir", "filelock", "matplotlib")
    for arguments in (
        ["show", bundle.folder],
        ["run", bundle.folder, "--embeddings", "prompts.safetensors", "--out", "out.npy"],
        ["bench", bundle.folder, "--engine", "ort", "--rounds", "1", "--no-warm-up"],
    ):
        made = in_a_process_without(absent, tmp_path, *arguments)
        assert made.returncode == 0, made.stderr
    assert np.isfinite(np.load(tmp_path / "out.npy")).all()
    made = in_a_process_without(absent, tmp_path, "compile", bundle.folder, "out")
    assert (made.returncode, made.stdout) == (1, "")
    assert made.stderr.startswith("error: This command needs the package ")
    assert made.stderr.endswith("Install it with: pip install 'blockcache[export]'\n")
    assert made.stderr.count("\n") == 1


ABSENT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from blockcache.tools.cli import main
main()
"""


def in_a_process_without(packages, folder, *arguments):
    """Run the command where some packages are not installed."""
    return subprocess.run(
        [sys.executable, "-c", ABSENT.format(packages=packages), *map(str, arguments)],
        cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_help_names_every_command(blockcache):
    code, out, _ = blockcache("--help")
    assert code == 0
    for command in COMMANDS:
        assert f" {command} " in out


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_shows_flags_without_a_value(blockcache, command):
    code, out, _ = blockcache(*([command] if command else []), "-h")
    assert code == 0
    assert "--help" in out
    assert "bool" not in out.lower()


def test_the_version_is_printed(blockcache):
    assert blockcache("--version") == (0, f"blockcache {__version__}\n", "")


def test_a_shell_can_complete_commands(monkeypatch, blockcache):
    monkeypatch.setenv("_BLOCKCACHE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "blockcache be")
    monkeypatch.setenv("COMP_CWORD", "1")
    code, out, _ = blockcache()
    assert (code, out.split()) == (0, ["bench"])


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "error: No space left on device at there. Free some space and run the same"),
        (errno.EROFS, "error: Read-only file system at there. Choose a folder that can be written"),
        (errno.EACCES, "error: Permission denied at there. Choose a folder that can be written"),
    ],
)
def test_the_disk_is_one_line(blockcache, monkeypatch, number, message):
    def fail():
        raise OSError(number, os.strerror(number), "there")

    monkeypatch.setattr(cli, "_app", fail)
    code, _, err = blockcache("show")
    assert code == 1
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_other_errors_of_the_system_keep_their_traceback(blockcache, monkeypatch):
    def fail():
        raise OSError(errno.EBADF, "a fault of ours")

    monkeypatch.setattr(cli, "_app", fail)
    with pytest.raises(OSError, match="a fault of ours"):
        blockcache("show")


@pytest.mark.parametrize(
    ("text", "target", "precision"),
    [
        (None, None, "float32"),
        (None, "a100", "bfloat16"),
        (None, "t4", "float16"),
        (None, "sm75+sm80", "float16"),
        ("fp16", "a100", "float16"),
        ("bf16", None, "bfloat16"),
        ("fp32", "a100", "float32"),
    ],
)
def test_a_target_sets_the_precision(text, target, precision):
    assert precision_for(text, target) == precision


def test_a_float32_bundle_for_a_gpu_is_warned_of(blockcache, compiled):
    _, bundle = compiled("sd")
    code, out, err = blockcache("estimate", bundle.folder, "--gpu", "a100")
    assert code == 0
    assert "Assumed precision: 16 bits, though the bundle computes in float32." in out
    assert err.startswith(
        "warning: this bundle computes in float32, in which TensorRT does not fuse attention: it "
        "is slow on a100. Compile the model again with --target a100"
    )
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("fitted", "guidance", "warned"),
    [(None, 9.0, False), ([], None, False), ([], 5.0, False), ([], 7.5, True)],
)
def test_more_guidance_than_a_preset_is_fitted_to_is_warned_of(
    compiled, caplog, fitted, guidance, warned
):
    preset = compiled("sd")[1].preset("ddim-4")
    preset = dataclasses.replace(preset, solver={**preset.solver, "fitted": fitted})
    assert preset.guidance_scale == 5.0
    caplog.clear()
    warn_of_guidance(preset, guidance)
    told = (
        "ddim-4 is fitted to guidance 5; at 7.5 its pictures end farther from those of more steps."
    )
    assert [r.getMessage().startswith(told) for r in caplog.records] == [True] * warned


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Expected at least one --prompt, or --embeddings FILE; not both."),
        (["--prompt", "a cat"], "has no text_encoder and no decoder. Compile the model again with"),
        (["--embeddings", "x", "--tile", 64], "Expected no --tile beside --embeddings"),
        (["--prompt", "a cat", "--image", "x"], "Expected a picture in x, got:"),
        (["--prompt", "a cat", "--mask-image", "x"], "Expected a picture in x, got:"),
        (["--prompt", "a cat", "--control-image", "x"], "Expected a picture in x, got:"),
        (["--prompt", "a cat", "--control-end", 0.5], "Expected --control-image FILE beside"),
        (["--embeddings", "x", "--depth-map", "x"], "Expected no --depth-map beside --embeddings"),
    ],
)
def test_a_run_says_what_to_give(blockcache, compiled, options, message):
    _, bundle = compiled("sd")
    code, _, err = blockcache("run", bundle.folder, *options)
    assert (code, err.count("\n")) == (1, 1)
    assert message in err


def test_a_pipeline_is_compiled_and_draws(blockcache, pipeline_folder, tmp_path):
    bundle, picture = tmp_path / "bundle", tmp_path / "drawn.png"
    compiling = ["compile", pipeline_folder("sd"), bundle, "--preset", "ddim:2"]
    code, out, _ = blockcache(*compiling)
    assert code == 0
    assert "text_encoder" in out
    drawing = ["run", bundle, "--prompt", "abc", "--prompt", "xyz", "--negative-prompt", "q"]
    code, out, _ = blockcache(*drawing, "--width", 96, "--out", picture, "--json")
    assert code == 0
    assert json.loads(out)["images"] == 2
    from_picture = ["--image", picture, "--strength", 0.5, "--out", tmp_path / "again.npy"]
    code, out, _ = blockcache("run", bundle, "--prompt", "abc", *from_picture, "--json")
    assert code == 0
    assert json.loads(out)["steps"] == 1
    assert np.load(tmp_path / "again.npy").shape == (1, 4, 16, 48)
    code, out, _ = blockcache(*compiling, "--parts", "unet", "--json")
    assert code == 0
    assert json.loads(out)["parts"] == []
    code, _, err = blockcache(*compiling, "--parts", "vae")
    assert (code, err) == (1, "error: Expected parts of all or unet, got 'vae'.\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "voodoo"], "'voodoo'"),
        (["--threads", 0], "threads"),
        (["--preset", "ddim:9"], "error: Expected a preset of"),
    ],
)
def test_a_run_checks_names_before_it_reads_prompts(
    blockcache, compiled, monkeypatch, tmp_path, options, message
):
    def read(*_):
        raise AssertionError("read first")

    monkeypatch.setattr("blockcache.tools.commands.run._from_embeddings", read)
    _, bundle = compiled("sd")
    out = ["--embeddings", "x", "--out", tmp_path / "x.npy"]
    code, _, err = blockcache("run", bundle.folder, *out, *options)
    assert (code, err.count("\n")) == (1, 1)
    assert message in err
