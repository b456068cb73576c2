"""What a forked child inherits and must never tear down: the engines of its parent.

Threads do not survive ``fork``. ONNX Runtime's destructors wait for threads of theirs, so a child
that frees an inherited engine hangs, and so does one that merely exits. Here each object that was
given to ``keep_in_children`` gets one reference too many in the child: nothing ever frees it there.
Its memory is shared with the parent and costs the child nothing.
"""

from __future__ import annotations

import ctypes
import os
import weakref

_kept: weakref.WeakSet[object] = weakref.WeakSet()


def keep_in_children(owner: object) -> None:
    """Let no forked child free ``owner`` or what it holds; in this process it is freed as usual."""
    _kept.add(owner)


def _keep() -> None:
    for owner in list(_kept):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))


os.register_at_fork(after_in_child=_keep)
