"""The kernels' benchmark: both sides of every case do the same work, here on the host."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from blockcache import kernels  # noqa: E402
from blockcache.tools.bench.kernels import __main__ as command  # noqa: E402
from blockcache.tools.bench.kernels import cuda, host  # noqa: E402
from blockcache.tools.bench.kernels.medians import medians  # noqa: E402


@pytest.fixture
def maker(twin_library):
    torch.manual_seed(0)
    return cuda.Maker(twin_library, "cpu", lambda: 0)


def test_the_kernels_do_what_torch_does(maker):
    cases = [*maker.latent_cases((2, 4, 6, 5)), *maker.feature_cases((3, 8, 6, 5))]
    assert len({case.kernel for case in cases}) == len(cases) == 6
    for case in cases:
        cuda.check(case)
        assert all(ours.abs().sum() > 0 for ours, _ in case.results)
    # Per element: 24 and 28 bytes of 2 x 120; 4, 6, 6 and 8 bytes of 3 x 240.
    assert [case.bytes for case in cases] == [5760, 6720, 2880, 4320, 4320, 5760]


def test_a_wrong_result_is_not_timed(maker):
    case = next(maker.feature_cases((1, 4, 3, 3)))
    wrong = dataclasses.replace(case, unfused=lambda: case.results[0][1].fill_(1e6))
    with pytest.raises(kernels.KernelError, match=r"^relative_change .*: expected torch's result"):
        cuda.check(wrong)


def test_every_shape_is_timed_and_the_large_ones_are_large(maker, monkeypatch):
    monkeypatch.setattr(maker, "latent_cases", lambda shape: [shape])
    monkeypatch.setattr(maker, "feature_cases", lambda shape: [shape])
    shapes = list(maker.cases())
    assert shapes == [*cuda.LATENTS, *cuda.FEATURES]
    # A cache of 60 MB holds little of 16.8 M latents at 24 bytes, or of 168 M features at 4.
    assert 24 * np.prod(cuda.LATENTS[-1]) > 400e6
    assert 4 * np.prod(cuda.FEATURES[-1]) > 600e6


def test_host_kernels_do_what_numpy_does(monkeypatch):
    monkeypatch.setattr(host, "LATENTS", [(2, 4, 5, 7)])
    monkeypatch.setattr(host, "FEATURES", [(2, 6, 5, 3)])
    cases = host.host_cases()
    for case in cases:
        case.ours()
        case.unfused()
        for ours, theirs in case.results:
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len(cases) == 4


def test_medians_take_turns():
    order = []
    works = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    rows = medians(works, lambda work: work() or float(len(order)), 3)
    assert order == ["a", "b"] * 6  # three of them warm up
    assert rows == {"a_us": 9.0, "b_us": 10.0}


def test_the_table_shows_bandwidth_and_ratios():
    row = {"kernel": "k", "shape": (2, 3), "bytes": 3_000_000}
    row |= {"ours_us": 2.0, "unfused_us": 9.0, "copy_us": 1.8}
    assert command.table([row], command.CUDA).splitlines() == [
        "| kernel | shape | MB | us | GB/s | copy GB/s | of copy | torch us | torch / ours |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| k | 2 x 3 | 3.0 | 2.0 | 1500 | 1667 | 90 % | 9.0 | 4.5x |",
    ]


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["kernels"])
    assert command.main() == 1
    assert capsys.readouterr().err == (
        "error: expected a CUDA device, found none; --host times the CPU's\n"
    )
