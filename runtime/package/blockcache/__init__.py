"""blockcache: Block Caching for diffusion U-Nets, offline compiler and embeddable runtime.

The wheel installs this file as ``blockcache/__init__.py``. Importing it loads nothing: each name
below is fetched from its own module when it is first used, so that a service which needs
``Session`` never pays for the compiler.

>>> import blockcache
>>> blockcache.Session.__module__
'blockcache.runtime.session'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockcache.runtime import BlockCacheError, Bundle, Pipeline, Session

__version__ = "0.1.0"

__all__ = ["BlockCacheError", "Bundle", "Pipeline", "Session", "__version__"]


def __getattr__(name: str) -> Any:
    """The public names of ``blockcache.runtime`` that every user meets."""
    if name in __all__:
        from blockcache import runtime

        return getattr(runtime, name)
    raise AttributeError(f"module 'blockcache' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
