"""What a TensorRT library says, and which GPUs and drivers it runs with."""

from __future__ import annotations

from importlib import metadata
from types import SimpleNamespace

import pytest

from blockcache.runtime.engines.tensorrt_library import (
    KEPT_MESSAGES,
    Messages,
    TensorRT,
    dotted,
)


@pytest.fixture
def library(tensorrt_module_of):
    """``library(title)``: one without a wheel."""

    def make(title="tensorrt_rtx"):
        module = tensorrt_module_of(title)
        return TensorRT(module.name, module, SimpleNamespace(messages=Messages()))

    return make


def test_two_threads_collect_side_by_side_and_stop():
    """In whatever order they begin and end."""
    messages = Messages()
    first, second = messages.collected(), messages.collected()
    lines = [first.__enter__(), second.__enter__()]
    messages.add("E", "to both")
    first.__exit__(None, None, None)
    messages.add("V", "to the second")
    second.__exit__(None, None, None)
    messages.add("E", "to nobody")
    assert lines == [[("E", "to both")], [("E", "to both"), ("V", "to the second")]]
    assert list(messages.recent) == [("E", "to both"), ("E", "to nobody")]


def test_the_last_warnings_and_errors_are_kept():
    messages = Messages()
    for number in range(KEPT_MESSAGES + 10):
        messages.add("W", str(number))
        messages.add("I", "much else")
    assert [text for _, text in messages.recent] == [str(n + 10) for n in range(KEPT_MESSAGES)]


def test_errors_are_quoted_before_what_was_said_earlier(library):
    made = library()
    assert made.quoted() == "nothing"
    made.logger.messages.add("W", "earlier\n")
    assert made.quoted([("I", "information")]) == "earlier"
    errors = [("E", f"error {n}") for n in range(5)]
    assert made.quoted([("W", "a warning"), *errors]) == "error 0 | error 1 | error 2"


@pytest.mark.parametrize(
    ("title", "capability", "runs"),
    [
        ("tensorrt_rtx", "8.0", True),
        ("tensorrt_rtx", "7.0", False),
        ("tensorrt_rtx", "9.0", False),
        ("tensorrt_rtx", "10.0", False),
        ("tensorrt_rtx", "12.1", True),
        ("tensorrt_rtx", "13.0", True),  # later than all it names
        ("tensorrt 11", "9.0", True),
    ],
)
def test_gpus_that_a_library_does_not_run_on(library, title, capability, runs):
    assert (library(title).gpu_problem(capability) == "") is runs


def test_capabilities_are_in_order(library):
    assert library().dotted_capabilities == ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
    assert dotted("SM121") == "12.1"


@pytest.mark.parametrize("installed", [None, "tensorrt_rtx_cu12", "tensorrt_rtx_cu13"])
def test_the_wheels_name_says_which_driver_is_needed(library, monkeypatch, installed):
    def version(name):
        if name != installed:
            raise metadata.PackageNotFoundError(name)
        return "1.7"

    monkeypatch.setattr(metadata, "version", version)
    made = library()
    assert made.driver_problem((13, 0)) == ""
    assert (made.driver_problem((12, 9)) == "") is (installed != "tensorrt_rtx_cu13")
    assert (made.driver_problem((11, 8)) == "") is (installed is None)
