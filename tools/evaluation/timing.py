"""How fast every preset draws: all take turns in one run, so that ratios hold on a busy machine."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from blockcache.runtime import Session
from blockcache.runtime.files import write_text
from blockcache.tools.evaluation.contest import Contestant
from blockcache.tools.evaluation.options import TimingOptions
from blockcache.tools.evaluation.sampling import Drawings
from blockcache.tools.evaluation.subject import Subject
from blockcache.tools.report.spread import Spread

Seconds = dict[str, list[float]]  # preset -> seconds of one call, by round


def images_per_second(seconds: Sequence[float], images: int) -> Spread:
    """Of calls that drew ``images`` images each."""
    return Spread.of([images / value for value in seconds])


def speedup(reference: Sequence[float], subject: Sequence[float]) -> Spread:
    """Round by round: both were timed within one turn."""
    return Spread.of_ratio(reference, subject)


def measure(
    contestants: Sequence[Contestant],
    drawings: Drawings,
    subject: Subject,
    options: TimingOptions,
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Seconds:
    """Seconds per call of every contestant; a finished measurement of the same is read back."""
    names = [drawings.key(contestant.preset) for contestant in contestants]
    facts = json.dumps([names, options.rounds, options.images])
    path = folder / f"timing-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"
    if path.is_file():
        return json.loads(path.read_text())
    sessions = {contestant.name: drawings.open(contestant.preset) for contestant in contestants}
    seconds: Seconds = {name: [] for name in sessions}
    turns = (options.rounds + 1) * len(sessions)
    for turn in range(options.rounds + 1):
        for place, (name, session) in enumerate(sessions.items()):
            progress(turn * len(sessions) + place, turns)
            guidance = drawings.guidance(session.preset)
            elapsed = _once(session, subject, options.images, guidance)
            if turn:  # the first round binds memory and warms up
                seconds[name].append(elapsed)
    progress(turns, turns)
    write_text(path, json.dumps(seconds))
    return seconds


def _once(session: Session, subject: Subject, images: int, guidance: float) -> float:
    """Seconds of one call, with the prompts already encoded and the noise drawn."""
    rows = [index % len(subject.prompts) for index in range(images)]
    positive, negative = subject.conditions(rows)
    noise = session.noise(range(images))
    states = positive.pop("encoder_hidden_states")
    empty = negative.pop("encoder_hidden_states", None)
    begin = time.perf_counter()
    session.denoise(
        noise,
        states,
        empty,
        conditions=positive,
        negative_conditions=negative,
        guidance_scale=guidance,
        seeds=range(images),
    )
    return time.perf_counter() - begin
