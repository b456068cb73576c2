"""Other libraries' messages go to the log or nowhere; ours to stderr."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

from blockcache.tools import cli
from blockcache.tools.library_messages import diverted


def speak():
    logging.getLogger("transformers").warning("torchvision is not there")
    warnings.warn_explicit("old operator", UserWarning, "/site-packages/torch/onnx.py", 7)
    logging.getLogger("blockcache.drift").warning("block %d drifts", 3)
    warnings.warn_explicit("DDIM runs in place of LCM", UserWarning, cli.__file__, 7)


def test_ours_are_lines_and_the_others_are_not_shown(capsys, monkeypatch):
    monkeypatch.setattr(logging, "lastResort", None)
    with diverted():
        speak()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "warning: block 3 drifts\nwarning: DDIM runs in place of LCM\n"


def test_a_log_file_holds_what_the_others_said(tmp_path, capsys):
    log = tmp_path / "new" / "log.txt"
    with diverted(log):
        speak()
    said = log.read_text()
    assert "transformers WARNING torchvision is not there" in said
    assert "torch/onnx.py:7: UserWarning: old operator" in said
    assert "drifts" in capsys.readouterr().err


def test_a_library_that_writes_by_itself_is_diverted_too(tmp_path, capsys):
    """As transformers does once it is imported."""
    library = logging.getLogger("transformers")
    handler = logging.StreamHandler()
    before = (library.handlers, library.propagate)
    library.handlers, library.propagate = [handler], False
    try:
        with diverted(tmp_path / "log.txt"):
            speak()
        assert (library.handlers, library.propagate) == ([handler], False)
    finally:
        library.handlers, library.propagate = before
    assert "torchvision is not there" in (tmp_path / "log.txt").read_text()
    assert "torchvision" not in capsys.readouterr().err


def test_everything_is_put_back():
    root, own, show = logging.getLogger(), logging.getLogger("blockcache"), warnings.showwarning
    before = list(root.handlers), list(own.handlers)
    with diverted():
        pass
    assert (list(root.handlers), list(own.handlers)) == before
    assert warnings.showwarning is show


def test_our_folders_are_the_four_rooms():
    from blockcache.tools.library_messages import OWN

    assert all(folder.is_dir() for folder in OWN)
    assert Path(cli.__file__).resolve().is_relative_to(OWN[-1])
