"""Options of the service behind Ray, without Ray."""

from __future__ import annotations

import pytest

from blockcache.runtime import ConfigError
from blockcache.tools.serve.ray_options import ServeOptions


@pytest.mark.parametrize(
    ("given_", "text"),
    [
        ({"slots": "4"}, r"Expected bundle=FOLDER and any of .*, got no bundle\."),
        ({"bundle": "b", "slot": "4"}, "got 'slot'"),
        ({"bundle": "b", "slots": "four"}, "slots: expected a whole number, got 'four'"),
        ({"bundle": "b", "slots": "0"}, "slots: expected a whole number of 1 or more, got 0"),
        ({"bundle": "a/b,c/b"}, r"bundle: expected folders by commas, .*, got 'a/b,c/b'\."),
        ({"bundle": "healthz"}, "with a name of its own, got 'healthz'"),
    ],
)
def test_arguments_of_the_builder_are_checked(given_, text):
    with pytest.raises(ConfigError, match=text):
        ServeOptions.of(given_)


def test_bundles_have_the_names_that_they_are_given_or_their_folders():
    options = ServeOptions.of({"bundle": "a/b, other=c/d", "slots": "4", "most_replicas": 3})
    assert list(options.bundles.items()) == [("b", "a/b"), ("other", "c/d")]
    assert (options.slots, options.most) == (4, 3)
