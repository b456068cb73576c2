import json
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from diffusers import DPMSolverMultistepScheduler  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from blockcache.tools.demo import contexts, data, unet  # noqa: E402
from blockcache.tools.demo.autoencoder import TinyAutoencoder  # noqa: E402
from blockcache.tools.demo.config import UNetConfig  # noqa: E402
from blockcache.tools.research import demo_quality  # noqa: E402
from blockcache.tools.research.demo_quality import DemoModel, Evaluation  # noqa: E402
from blockcache.tools.research.draw import SampleOptions  # noqa: E402

OPTIONS = SampleOptions(steps=2, batch=4)


class Pixels:
    """Features of a few pixels, in place of the network."""

    def pooled(self, images, done):
        return images[:, :, ::16, ::16].reshape(len(images), -1).astype(np.float32) / 255


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Eight pictures, four concepts in two styles, with captions of noise."""
    monkeypatch.setattr(demo_quality.features, "Extractor", Pixels)
    random = np.random.default_rng(0)
    pictures = [
        data.Picture(
            style=style,
            words=f"thing {index}",
            category="Objects",
            caption=f"{style} emoji, thing {index}",
            held_out=False,
            weight=1.0,
        )
        for style in ("flat", "noto")
        for index in range(4)
    ]
    images = random.integers(0, 256, (8, 3, 64, 64), np.uint8)
    data.save(data.Dataset(images=images, pictures=pictures), tmp_path)
    states = torch.from_numpy(random.standard_normal((9, 20, 384))).half()
    save_file({"contexts": states}, tmp_path / contexts.NAME)
    return tmp_path


def demo_model(name="demo model"):
    torch.manual_seed(0)
    config = UNetConfig(channels=(16, 32), transformer_layers=(1, 1), head_channels=16)
    autoencoder = TinyAutoencoder(wide=8, narrow=8).eval()
    return DemoModel(
        name=name,
        unet=unet.build(config, 16).eval(),
        scheduler=DPMSolverMultistepScheduler(**unet.SCHEDULE),
        autoencoder=autoencoder,
    )


def test_more_pictures_than_captions_draw_captions_again_from_other_noise(work, monkeypatch):
    monkeypatch.setattr(demo_quality, "PART", 8)
    evaluation = Evaluation(work, OPTIONS, 16)
    assert sorted(evaluation.chosen) == sorted([*range(8), *range(8)])
    drawn = evaluation._draw(demo_model())
    assert drawn.shape == (16, 3, 64, 64)
    assert not np.array_equal(drawn[0], drawn[8])


def test_parts_that_were_drawn_are_not_drawn_again(work):
    first = Evaluation(work, OPTIONS, 4)._draw(demo_model())
    files = list((work / "drawn").rglob("*.npy"))
    marked = np.zeros_like(first)
    np.save(files[0], marked)
    assert np.array_equal(Evaluation(work, OPTIONS, 4)._draw(demo_model()), marked)
    other = replace(OPTIONS, guidance=1.0)
    assert not np.array_equal(Evaluation(work, other, 4)._draw(demo_model()), marked)


def test_report_holds_floor_autoencoder_model_and_baseline(work):
    heard = []
    evaluation = Evaluation(work, OPTIONS, 4, observer=lambda *at: heard.append(at))
    models = [demo_model(), demo_model("baseline")]
    report = demo_quality.evaluate(evaluation, models, work / "results")
    assert heard == [("demo model: sampling", 1, 1), ("baseline: sampling", 1, 1)]
    names = [score.name for score in report.scores]
    assert names[0].startswith("real pictures (half")
    assert names[1:] == ["real pictures through the autoencoder", "demo model", "baseline"]
    assert [score.pictures for score in report.scores] == [4, 8, 4, 4]
    assert report.scores[2].frechet == report.scores[3].frechet > 0
    stored = json.loads((work / "results" / "quality.json").read_text())
    assert stored["scores"][2]["parameters"] == demo_model().parameters()
    table = (work / "results" / "quality.md").read_text()
    assert table.count("\n| ") == 6  # titles, rule, four rows
