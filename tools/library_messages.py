"""What other libraries say while a command runs goes to a log file or is not shown.

Loading bars, exporter warnings and notices about absent packages would bury our own lines.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

SETTINGS = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
}
"""Environment variables that transformers, diffusers, huggingface_hub and tqdm read on import."""

SPEAKING_ALONE = ("transformers", "diffusers", "huggingface_hub")
"""Libraries whose loggers, once imported, have a handler of their own and hand nothing on."""

_ROOT = Path(__file__).resolve().parents[1]
OWN = tuple(_ROOT / room for room in ("export", "runtime", "kernels", "tools"))
"""Folders whose warnings are ours."""


@contextmanager
def diverted(log: Path | None = None) -> Iterator[None]:
    """Send messages and warnings of other libraries to ``log``, or nowhere; ours to stderr.

    Enter it before those libraries are imported. Environment variables that the user has set keep
    their values.

    Raises:
        OSError: ``log`` cannot be written.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    others: logging.Handler = logging.NullHandler()
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        others = logging.FileHandler(log)
        others.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    ours = _Lines()
    root, own = logging.getLogger(), logging.getLogger("blockcache")
    root.addHandler(others)
    own.addHandler(ours)
    with warnings.catch_warnings(), _heard_by_all(SPEAKING_ALONE):
        warnings.showwarning = _show_warning
        try:
            yield
        finally:
            root.removeHandler(others)
            own.removeHandler(ours)
            others.close()


@contextmanager
def _heard_by_all(names: Sequence[str]) -> Iterator[None]:
    """Loggers that write to stderr by themselves hand their messages on instead."""
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [], True
    try:
        yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate


class _Lines(logging.Handler):
    """Our own messages: one line each on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Hand a warning to the logger of whoever gave it."""
    if any(Path(filename).resolve().is_relative_to(folder) for folder in OWN):
        logging.getLogger("blockcache").warning("%s", message)
    else:
        place = f"{filename}:{lineno}: {category.__name__}"
        logging.getLogger("py.warnings").warning("%s: %s", place, message)
