"""A forked child of a process with an open session: it ends, says what to do, opens its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("onnxruntime")
if not hasattr(os, "fork"):
    pytest.skip("no fork on this system", allow_module_level=True)

SCRIPT = """
import os, sys
import numpy as np
from blockcache.runtime import ConfigError, Session

def open_and_draw(fork=lambda: None):
    with Session.open(sys.argv[1], preset="ddim-4", backend="ort", threads=2) as session:
        prompt = np.ones((1, 7, 32), np.float32)
        arguments = session.noise([0]), prompt, prompt
        latents = session.denoise(*arguments).latents
        return fork(session, arguments, latents) if fork else latents

def in_the_child(session, arguments, latents):
    {child}

def fork(session, arguments, latents):
    child = os.fork()
    if child == 0:
        in_the_child(session, arguments, latents)
        sys.exit(7)  # as a worker ends: the interpreter tears everything down
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert (session.denoise(*arguments).latents == latents).all()
    print("status", status, flush=True)

open_and_draw(fork)
"""

CHILDREN = {
    "ends": "pass",
    "closes it": "session.close()",
    "lets go of it": "del session, arguments",
    "asks it": """
        for call in (session.memory, session.launches, lambda: session.denoise(*arguments)):
            try:
                call()
            except ConfigError as error:
                print(error, flush=True)
    """,
    "opens its own": "assert (open_and_draw(None) == latents).all(); print('same', flush=True)",
}
REFUSED = (
    "This session was opened before the process forked, and the engine library's threads stayed in "
    "the parent. Open a session in the child: Session.open; with gunicorn in the hook post_fork."
)
SAID = {"asks it": [REFUSED] * 3, "opens its own": ["same"]}


@pytest.mark.parametrize("child", CHILDREN)
def test_a_forked_child_ends_and_the_parent_goes_on(compiled, child):
    """Without the cure the child hangs in the destructors of ONNX Runtime's thread pools."""
    body = textwrap.indent(textwrap.dedent(CHILDREN[child]).strip(), "    ").strip()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("{child}", body), str(compiled("sd")[1].folder)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout.splitlines() == [*SAID.get(child, []), "status 7"]
