"""Progress of long work: whoever does it tells an observer how far each of its stages is."""

from __future__ import annotations

from typing import Protocol


class Observer(Protocol):
    """Hears how far long work is."""

    def __call__(self, stage: str, done: int, total: int, /) -> None:
        """``done`` of ``total`` units of ``stage`` are finished; 0 in all: nobody knows how many.

        A stage reports in order, and ends with ``done`` equal to ``total``.
        """


def unobserved(stage: str, done: int, total: int, /) -> None:
    """The observer where nobody wants to know."""


def qualified(observer: Observer, name: str) -> Observer:
    """An observer that adds ``name`` to every stage: "profile" is heard as "profile dpm-20"."""

    def hear(stage: str, done: int, total: int, /) -> None:
        observer(f"{stage} {name}", done, total)

    return hear
