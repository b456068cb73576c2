"""Which CUDA graph is used, when it is captured, what is compared: without a device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from blockcache.runtime.devices.cuda import CudaDevice
from blockcache.runtime.devices.cuda_stream import Scratch
from blockcache.runtime.devices.graphs import (
    WHOLE_LOOP,
    GraphKey,
    GraphPlayer,
    LoopGraphs,
    check_addresses,
)
from blockcache.runtime.devices.host import HostDevice
from blockcache.runtime.errors import ConfigError, EngineError


class FakeDevice:
    """Captures by calling: replaying a graph appends what was enqueued at capture."""

    def __init__(self, log, refuses=""):
        self.log, self.refuses, self.scratch_generation = log, refuses, 1

    def capture(self, enqueue):
        if self.refuses:
            raise EngineError(self.refuses)
        before = len(self.log)
        enqueue()
        recorded = self.log[before:]
        del self.log[before:]
        return lambda: self.log.extend(recorded)


@pytest.fixture
def log():
    return []


@pytest.fixture
def tensors():
    host = HostDevice()
    return {"latents": host.tensor(host.allocate(16), 0, (4,), "float32")}


def graphs_of(player, tensors, first=0):
    return LoopGraphs(player, (2, 16, 16, 7, 1, first, 1), tensors)


def test_the_loop_is_captured_once_and_replayed(log, tensors):
    player = GraphPlayer(FakeDevice(log))
    graphs = graphs_of(player, tensors)
    for _ in range(3):
        graphs.play_loop(range(3), log.append)
    assert log == [0, 1, 2] * 3
    assert len(player) == 1


def test_graphs_of_a_shape_whose_memory_goes_are_dropped(log, tensors):
    player = GraphPlayer(FakeDevice(log))
    for first in (0, 1):
        graphs_of(player, tensors, first).play_loop(range(3), log.append)
    other = LoopGraphs(player, (4, 16, 16, 7, 2, 0, 1), tensors)
    other.play_loop(range(3), log.append)
    assert len(player) == 3
    player.forget((2, 16, 16, 7, 1))
    assert len(player) == 1
    log.clear()
    graphs_of(player, tensors).play_loop(range(3), log.append)
    assert log == [0, 1, 2]
    assert len(player) == 2


def test_steps_have_graphs_of_their_own(log, tensors):
    player = GraphPlayer(FakeDevice(log))
    graphs = graphs_of(player, tensors)
    for _ in range(2):
        for step in range(4):
            graphs.play_step(step, log.append)
    assert log == [0, 1, 2, 3] * 2
    assert len(player) == 4


def test_another_first_step_is_another_graph(log, tensors):
    player = GraphPlayer(FakeDevice(log))
    graphs_of(player, tensors, 0).play_loop(range(2), log.append)
    graphs_of(player, tensors, 1).play_loop(range(1, 2), log.append)
    assert (log, len(player)) == ([0, 1, 1], 2)


def test_keys_tell_loop_and_steps_apart():
    assert GraphKey((2,), WHOLE_LOOP, 1) != GraphKey((2,), 0, 1)
    assert hash(GraphKey((2,), 0, 1)) == hash(GraphKey((2,), 0, 1))


def test_moved_scratch_memory_captures_anew(log, tensors):
    device = FakeDevice(log)
    player = GraphPlayer(device)
    graphs_of(player, tensors).play_loop(range(1), log.append)
    device.scratch_generation = 2
    later = graphs_of(player, tensors)
    assert player.play(GraphKey((0,), 0, 2), lambda: None, {}) is False  # the old one is dropped
    later.play_loop(range(1), log.append)
    assert (log, len(player)) == ([0, 0], 2)


def test_a_device_that_cannot_capture_launches_on(log, tensors, caplog):
    player = GraphPlayer(FakeDevice(log, refuses="not capturable"))
    graphs = graphs_of(player, tensors)
    for _ in range(2):
        graphs.play_loop(range(2), log.append)
    assert log == [0, 1, 0, 1]
    assert player.why_not == "not capturable"
    assert caplog.text.count("not capturable") == 1


def test_a_capture_that_fails_is_tried_again(log, tensors, caplog):
    device = FakeDevice(log, refuses="somebody waits for the device")
    player = GraphPlayer(device)
    graphs = graphs_of(player, tensors)
    graphs.play_loop(range(2), log.append)
    assert player.why_not == "somebody waits for the device"
    device.refuses = ""
    for _ in range(2):
        graphs.play_loop(range(2), log.append)
    assert (log, len(player), player.why_not) == ([0, 1] * 3, 1, "")


def test_a_capture_is_tried_three_times_for_each_graph(log, tensors, monkeypatch):
    device, tried = FakeDevice(log), []

    def refuse(enqueue):
        tried.append(1)
        raise EngineError("never")

    monkeypatch.setattr(device, "capture", refuse)
    player = GraphPlayer(device)
    for first in (0, 1):
        for _ in range(5):
            graphs_of(player, tensors, first).play_loop(range(first, 2), log.append)
    assert len(tried) == 6


@pytest.mark.parametrize("one_by_one", [False, True])
def test_graphs_of_the_runs_unused_for_longest_are_let_go(log, tensors, one_by_one):
    player = GraphPlayer(FakeDevice(log))
    for first in (*range(20), 4):  # the last sixteen are kept; then 4 anew, in place of 5
        graphs = graphs_of(player, tensors, first)
        play = graphs.play_step if one_by_one else graphs.play_loop
        play(first if one_by_one else range(first, first + 1), log.append)
    assert len(player) == 16
    log.clear()
    device = player.device
    device.refuses = "captured anew"
    for first in (4, 19):
        graphs = graphs_of(player, tensors, first)
        (graphs.play_step if one_by_one else graphs.play_loop)(
            first if one_by_one else range(first, first + 1), log.append
        )
    assert player.why_not == "", "both were kept"


def test_a_graph_is_kept_under_the_scratch_memory_that_it_holds(log, tensors):
    """A request binds after its graphs are chosen, and binding may move the memory."""
    device = FakeDevice(log)
    player = GraphPlayer(device)
    graphs = graphs_of(player, tensors)
    device.scratch_generation = 2
    graphs.play_loop(range(1), log.append)
    device.refuses = "captured anew"
    graphs_of(player, tensors).play_loop(range(1), log.append)
    assert (len(player), player.why_not) == (1, "")


def test_switched_off(log, tensors):
    player = GraphPlayer(FakeDevice(log), "off")
    graphs_of(player, tensors).play_loop(range(1), log.append)
    assert (log, len(player)) == ([0], 0)


def test_settled_is_called_once_a_key(log, tensors):
    calls = []
    player = GraphPlayer(FakeDevice(log), settled=lambda: calls.append(1))
    graphs = graphs_of(player, tensors)
    for _ in range(3):
        graphs.play_loop(range(1), log.append)
    assert calls == [1]


def test_the_check_mode_sees_a_moved_tensor(log, tensors):
    player = GraphPlayer(FakeDevice(log), "check")
    key = GraphKey((1,), WHOLE_LOOP, 1)
    player.play(key, lambda: None, {"latents": 256, "history": 512})
    player.play(key, lambda: None, {"latents": 256, "history": 512})
    with pytest.raises(EngineError, match=r"these moved: latents \(1 in all\)"):
        player.play(key, lambda: None, {"latents": 768, "history": 512})


@pytest.mark.parametrize("now", [{}, {"a": 2}, {"a": 1, "b": 1}])
def test_any_difference_in_addresses_is_seen(now):
    with pytest.raises(EngineError, match="moved"):
        check_addresses({"a": 1}, now)


def test_an_unknown_mode_is_refused(log):
    with pytest.raises(ConfigError, match="'auto'"):
        GraphPlayer(FakeDevice(log), "always")


# -- the activation memory that all contexts share -------------------------------------------------


class Memory:
    def __init__(self, pointer):
        self.pointer = pointer


class User:
    name = "trunk_00"

    def set_memory(self, pointer, count):
        self.memory = (pointer, count)

    def capturable(self):
        return True


def test_scratch_is_the_maximum_and_tells_its_users():
    pointers = iter([1000, 2000, 3000])
    scratch = Scratch(lambda count: Memory(next(pointers)))
    users = [User() for _ in range(4)]
    for count, user in zip((10, 5, 20, 20), users, strict=True):
        scratch.use(count, user)
    assert {user.memory for user in users} == {(2000, 20)}
    assert (scratch.bytes, scratch.generation) == (20, 2)


def test_a_device_names_the_engines_that_cannot_be_captured():
    device = CudaDevice.__new__(CudaDevice)  # without a GPU: it must refuse before any CUDA call
    device._stream = SimpleNamespace(handle=77, scratch=Scratch(lambda count: Memory(1000)))
    refusing = User()
    refusing.capturable = lambda: False
    device.scratch.use(10, refusing)
    with pytest.raises(EngineError, match="cannot be captured: trunk_00"):
        device.capture(lambda: None)
