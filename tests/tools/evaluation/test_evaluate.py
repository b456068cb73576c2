"""The whole way on a tiny model: once with a decoder and a fake feature network, once without."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

from safetensors.numpy import save_file

from blockcache.runtime.provenance import Provenance
from blockcache.tools import cli
from blockcache.tools.evaluation import features, figures, run
from blockcache.tools.evaluation.options import DrawOptions, EvaluationOptions, TimingOptions
from blockcache.tools.evaluation.subject import RealPictures


@pytest.fixture
def bundle(compiled, with_presets):
    """The tiny bundle as if it also held two cached presets and a shorter run."""
    _, opened = compiled("small")
    base = opened.preset("ddim-4")

    def cached(name, rows, **policy):
        table = base.schedule.recompute.copy()
        table[rows] = False
        schedule = dataclasses.replace(base.schedule, recompute=table)
        return dataclasses.replace(
            base, name=name, schedule=schedule, provenance=Provenance(**policy)
        )

    shorter = dataclasses.replace(
        base,
        name="ddim-2",
        solver={**base.solver, "steps": 2},
        schedule=dataclasses.replace(base.schedule, recompute=base.schedule.recompute[:2]),
        alignment=type(base.alignment)(tuple(t[:2] for t in base.alignment.tables)),
        time_tables={name: table[::2] for name, table in base.time_tables.items()},
    )
    return with_presets(
        opened,
        dataclasses.replace(base, provenance=Provenance(kind="uncached")),
        shorter,
        cached("ddim-4-d0.1", [1], kind="threshold", value=0.1),
        cached("ddim-4-d0.9", [1, 3], kind="threshold", value=0.9),
    )


class FakeExtractor:
    """Ten numbers of a picture, and a count of the pictures seen."""

    seen = 0

    def pooled(self, images, done=lambda count: None):
        type(self).seen += len(images)
        done(len(images))
        return images.reshape(len(images), -1)[:, :10].astype(np.float32) / 100


@pytest.fixture
def fake_extractor(monkeypatch):
    FakeExtractor.seen = 0
    monkeypatch.setattr(features, "Extractor", FakeExtractor)
    return FakeExtractor


def decode(latents):
    return (np.clip(latents[:, :3], -1, 1) * 127 + 128).astype(np.uint8).transpose(0, 2, 3, 1)


OPTIONS = EvaluationOptions(
    draw=DrawOptions(images=6, batch=3, guidance=2.0),
    timing=TimingOptions(rounds=2, images=1),
    resamples=20,
)


@pytest.mark.parametrize(
    ("with_real", "yardstick"),
    [(False, "converged"), (False, "uncached"), (True, "uncached")],
    ids=["converged", "drawn reference", "real pictures"],
)
def test_everything_is_written_and_a_second_run_computes_nothing(
    bundle,
    compiled,
    conditions_of,
    subject_of,
    fake_extractor,
    tmp_path,
    monkeypatch,
    with_real,
    yardstick,
):
    options = dataclasses.replace(OPTIONS, yardstick=yardstick)
    monkeypatch.setattr(figures, "COLUMNS", 2)
    rng = np.random.default_rng(0)
    real = RealPictures(
        pictures=rng.integers(0, 255, (24, 3, 16, 16), np.uint8),
        styles=np.array(["x", "y"] * 12),
        concepts=np.array([f"c{i // 2}" for i in range(24)]),
        chosen=np.arange(6),
        folder=tmp_path / "features",
    )
    more = {"decode": decode, "decoder": "d", "real": real if with_real else None}
    subject = subject_of(compiled("small")[0], conditions_of, 6, **more)
    report = run.evaluate(bundle, subject, options, tmp_path / "out")
    assert fake_extractor.seen == (4 * 6 + 24 if with_real else 5 * 6)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {
        "evaluation.md", "evaluation.json", "frontier.png", "grid-ddim-4.png",
        "delta-ddim-4.png", "work",
    }  # fmt: skip
    (group,) = report.groups
    rows = {row.preset: row for row in group.rows}
    assert list(rows) == ["ddim-4", "ddim-2", "ddim-4-d0.1", "ddim-4-d0.9"]
    assert group.yardstick == ("converged" if yardstick == "converged" else "ddim-4")
    assert (rows["ddim-4"].quality["distance"].value == 0) == (yardstick == "uncached")
    assert rows["ddim-4-d0.1"].quality["distance"].value > 0
    metrics = {"frechet", "kid", "distance", "psnr_db"} | ({"top1", "top5"} if with_real else set())
    assert set(rows["ddim-2"].quality) == metrics
    own = {"own_distance"} if yardstick == "converged" else set()
    assert set(rows["ddim-4-d0.9"].quality) == metrics | own
    compared = {c.subject: set(c.findings) for c in group.comparisons if c.against == "uncached"}
    judged = {"frechet", "kid"} | (
        {"distance", "psnr_db"} if own else metrics - {"distance", "psnr_db"}
    )
    assert compared["ddim-4-d0.9"] == judged
    assert bool(group.floor) == with_real

    first = (tmp_path / "out" / "evaluation.json").read_text()
    run.evaluate(bundle, subject, options, tmp_path / "out")
    assert (tmp_path / "out" / "evaluation.json").read_text() == first
    assert fake_extractor.seen == (4 * 6 + 24 if with_real else 5 * 6)


def test_the_command_compares_latents_of_encoded_prompts(
    compiled, conditions_of, tmp_path, monkeypatch, capsys
):
    model, opened = compiled("small")
    positive, negative = conditions_of(model, 2), conditions_of(model, 1, seed=1)
    tensors = positive | {f"negative.{name}": values for name, values in negative.items()}
    save_file(tensors, tmp_path / "encoded.safetensors")
    arguments = ["evaluate", opened.folder, "--embeddings", tmp_path / "encoded.safetensors"]
    arguments += ["--preset", "ddim-4", "--images", 3, "--rounds", 1, "--timed-images", 1]
    arguments += ["--out", tmp_path / "out", "--json", "--reference", "ddim-4"]
    arguments += ["--yardstick", "uncached"]
    monkeypatch.setattr(sys, "argv", ["blockcache", *map(str, [*arguments, "--only-timing"])])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert capsys.readouterr().out == ""
    timed = next((tmp_path / "out" / "work").glob("timing-*.json")).read_text()

    monkeypatch.setattr(sys, "argv", ["blockcache", *map(str, arguments)])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    report = json.loads(capsys.readouterr().out)
    (group,) = report["groups"]
    (row,) = group["rows"]
    assert group["name"] == row["preset"] == "ddim-4"
    assert set(row["quality"]) == {"distance"}
    seconds = json.loads(timed)["ddim-4"]
    assert row["images_per_s"]["median"] == pytest.approx(1 / seconds[0])

    monkeypatch.setattr(sys, "argv", ["blockcache", *map(str, arguments), "--reference", "ddim-9"])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert "Expected a preset of ['ddim-4', 'dpm-20'], got 'ddim-9'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "error: Expected --model FOLDER (for text encoder and VAE) or --embeddings FILE"),
        (["--model", "demo", "--reference-work", "nowhere"], "error: Expected the demo's pictures"),
        (["--model", "nowhere"], "error: Expected a diffusers folder or a hub id"),
        (["--images", "1"], "error: Expected 2 images or more, for a spread"),
        (["--yardstick", "x"], "error: Expected a yardstick of ['converged', 'uncached'], got 'x'"),
        (["--resamples", "3"], "error: Expected 20 resamples or more for a 90 % interval, got 3."),
        (
            ["--model", "m", "--reference-work", "w"],
            "error: --reference-work holds the demo model's pictures and their captions",
        ),
    ],
)
def test_errors_come_before_any_work(compiled, tmp_path, monkeypatch, capsys, more, message):
    _, opened = compiled("small")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["blockcache", "evaluate", str(opened.folder), *more])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert capsys.readouterr().err.startswith(message)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
