"""Expected errors of a script: one line on stderr and exit code 1, without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from blockcache.runtime.errors import BlockCacheError


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print a BlockCacheError of the body and end the process; any other keeps its traceback."""
    try:
        yield
    except BlockCacheError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
