"""Both halves of guidance come from one place: the demo's own parts, or the model's pipeline."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from blockcache.export.unet.text import encode_text
from blockcache.tools.demo.model import default_prompts
from blockcache.tools.sources.codecs import DemoCodec, codec_for
from blockcache.tools.sources.models import DEMO
from blockcache.tools.sources.prompts import calibration_for

STATES = "encoder_hidden_states"


def test_the_demo_s_halves_are_its_prompts_and_the_empty_one():
    prompts = default_prompts()[:2]
    assert isinstance(codec_for(DEMO), DemoCodec)
    positive, negative = codec_for(DEMO).encode(prompts)
    assert positive[STATES].shape[0] == 2
    assert negative[STATES].shape == (1, *positive[STATES].shape[1:])
    encoded, _ = codec_for(DEMO).encode([""])
    np.testing.assert_array_equal(negative[STATES], encoded[STATES])


def test_a_folders_halves_are_its_pipelines_at_the_size_asked_for(pipeline_folder):
    folder, size = pipeline_folder("sdxl"), (8, 24)
    codec = codec_for(str(folder))
    for ours, wanted in zip(
        codec.encode(["a cat"], size), encode_text(folder, ["a cat"], size), strict=True
    ):
        assert ours.keys() == wanted.keys()
        for name, values in wanted.items():
            np.testing.assert_array_equal(ours[name], values)
    assert codec.decode(np.zeros((1, 4, *size), np.float32)).shape == (1, 32, 96, 3)


def test_a_folders_calibration_is_what_its_pipeline_feeds(pipeline_folder, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\na dog\n")
    calibration = calibration_for(str(pipeline_folder("sdxl")), None, file)
    assert calibration.prompts == 2
    assert not calibration.negative[STATES].any()  # zeros for the empty prompt, as SDXL has it
