"""The command line: the main job through the same door as a user, errors in one line."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("onnxruntime")
pytest.importorskip("diffusers")

from safetensors.numpy import save_file

from blockcache.runtime import Bundle, DriftMonitor, Session
from blockcache.tools import cli


@pytest.fixture
def blockcache(monkeypatch, capsys):
    """``blockcache(*arguments)`` gives (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["blockcache", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


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
    code, out, _ = blockcache("compile", source, bundle, *arguments, *presets, "--json")
    assert code == 0
    facts = json.loads(out)
    assert set(facts["presets"]) == {"ddim-4-d0.2", "ddim-4"}
    assert len(facts["blocks"]) == 7

    drawn = ["--plot", tmp_path / "schedule.svg", "--plot-change", tmp_path / "change.svg"]
    code, out, _ = blockcache("show", bundle, *drawn)
    assert code == 0
    assert "█" in out
    assert (tmp_path / "schedule.svg").read_text().lstrip().startswith("<?xml")

    assert "<path" in (tmp_path / "change.svg").read_text()

    latents = tmp_path / "latents.npy"
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
    again += ["--preset", "ddim:4:ms1000000", "--profile-prompts", 1, "--profile-seeds", 1]
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
            "error: Expected a preset SOLVER:STEPS[:POLICY[:ALIGNMENT]] such as dpm:20:0.5 or "
            "dpm:20:x1.5:history, got 'dpm'.",
        ),
        (["compile", "demo", "out", "--preset", "heun:9"], "error: Expected a solver of"),
        (["compile", "demo", "out", "--precision", "int8"], "error: Expected a precision of"),
        (["compile", "demo", "out", "--gpu", "voodoo"], "error: Expected a GPU of"),
        (
            ["compile", "demo", "out", "--preset", "dpm:20:ms250"],
            "error: A preset of so many milliseconds needs times. Give measured ones (blockcache "
            "bench BUNDLE --timings FILE, then --timings FILE here), or a GPU to predict them for "
            "(--gpu a100).",
        ),
    ],
)
def test_expected_errors_are_one_line_and_exit_code_1(blockcache, arguments, message, tmp_path):
    code, out, err = blockcache(*arguments)
    assert code == 1
    assert out == ""
    *progress, last = err.strip().splitlines()
    assert last.startswith(message)
    assert not any("error" in line for line in progress)
    assert "Traceback" not in err


def test_help_names_every_command(blockcache):
    code, out, _ = blockcache("--help")
    assert code == 0
    known = ("demo", "compile", "run", "show", "build", "check", "bench", "estimate", "evaluate")
    for command in known:
        assert f" {command} " in out


def test_a_run_without_text_encoder_says_what_to_give(blockcache, compiled):
    _, bundle = compiled("sd")
    code, _, err = blockcache("run", bundle.folder, "--prompt", "a cat")
    assert code == 1
    assert "Expected --model FOLDER (for text encoder and VAE), or --embeddings FILE" in err
