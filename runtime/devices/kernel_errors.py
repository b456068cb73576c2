"""Errors of blockcache's own kernels, as the runtime raises them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from blockcache import kernels
from blockcache.runtime.errors import EngineError


@contextlib.contextmanager
def kernel_errors() -> Iterator[None]:
    """A KernelError inside becomes an EngineError: the kernels cannot import the runtime's."""
    try:
        yield
    except kernels.KernelError as error:
        raise EngineError(
            f"blockcache's kernels failed: {error}. Install blockcache again, built for this "
            f"machine, and please report it."
        ) from error
