"""The one type of observer: what is heard of work that is nobody's, or part of something."""

from __future__ import annotations

from blockcache.export.observer import qualified, unobserved


def test_a_qualified_observer_hears_which_of_several_it_is():
    heard = []
    observer = qualified(lambda *progress: heard.append(progress), "dpm-20")
    observer("profile", 1, 8)
    qualified(observer, "again")("align", 2, 0)
    assert heard == [("profile dpm-20", 1, 8), ("align again dpm-20", 2, 0)]


def test_work_that_nobody_watches_tells_no_one():
    assert unobserved("profile", 1, 8) is None
