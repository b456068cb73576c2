import pytest

from blockcache.tools.demo.concepts import caption, concept, is_held_out, parse_caption


@pytest.mark.parametrize(
    ("key", "category", "words"),
    [
        ("red-apple", "Food & Drink", "red apple"),
        ("flag-for-flag-japan", "Flags", "flag of japan"),
        ("flag-for-japan", "Flags", "flag of japan"),
        ("flag-japan", "Flags", "flag of japan"),
        ("flag-in-hole", "Activities", "flag in hole"),
        ("thumbs-up", "People & Body", "thumbs up"),
        ("yin-yang", "Symbols", "yin yang"),
    ],
)
def test_wanted_concepts_are_named_in_words(key, category, words):
    found = concept(key, category)
    assert found is not None
    assert found.words == words


@pytest.mark.parametrize(
    ("key", "category"),
    [
        ("man-cook", "People & Body"),
        ("thumbs-up-medium-dark-skin-tone", "People & Body"),
        ("ten-oclock", "Travel & Places"),
        ("keycap-3", "Symbols"),
        ("japanese-vacancy-button", "Symbols"),
        ("letter-a", "Symbols"),
        ("something-new", None),
    ],
)
def test_unnameable_icons_are_dropped(key, category):
    assert concept(key, category) is None


def test_caption_and_parse_are_inverse():
    assert parse_caption(caption("twitter", "red apple")) == ("twitter", "red apple")


def test_parse_says_what_it_expected():
    with pytest.raises(ValueError, match='expected "STYLE emoji, CONCEPT", got "red apple"'):
        parse_caption("red apple")


def test_split_depends_on_the_pair_only():
    pairs = [(style, f"thing {i}") for style in ("noto", "flat") for i in range(2000)]
    held_out = [is_held_out(style, words, 5) for style, words in pairs]
    assert held_out == [is_held_out(style, words, 5) for style, words in pairs]
    assert 0.035 < sum(held_out) / len(held_out) < 0.065
    assert not any(is_held_out(style, words, 0) for style, words in pairs)
    wider = [is_held_out(style, words, 10) for style, words in pairs]
    assert all(wide for narrow, wide in zip(held_out, wider, strict=True) if narrow)
