"""Each CUDA kernel against the host library, on a GPU: same bits, or the reduction's tolerance."""

import ctypes

import numpy as np
import pytest

from blockcache import kernels

pytestmark = pytest.mark.gpu

NUMBERS = {"float32": 0, "float16": 1, "bfloat16": 2}
SIZES = [(1, 16384), (2, 4 * 96 * 96), (3, 777), (2, 1), (5, 20001)]
UNIT = 2.0**-24


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if kernels.cuda_library() is None:
        pytest.skip("the CUDA library is not installed")
    torch.manual_seed(0)
    return torch


def device(torch, shape, T="float32", offset=0):
    """Normal numbers on the GPU, starting `offset` elements after an aligned allocation."""
    dtype = getattr(torch, T)
    size = int(np.prod(shape))
    return torch.randn(size + offset, device="cuda").to(dtype)[offset:].view(shape)


def on_host(tensor):
    """A numpy copy; bfloat16 as its bits."""
    if tensor is None:
        return None
    if str(tensor.dtype) != "torch.bfloat16":
        return tensor.cpu().numpy()
    return tensor.cpu().view(tensor.short().dtype).numpy().view(np.uint16)


def address(tensor):
    return None if tensor is None else tensor.data_ptr()


def launch(torch, name, *arguments):
    library, stream = kernels.cuda_library(), torch.cuda.current_stream().cuda_stream
    kernels.check(library, name, getattr(library, f"bc_cuda_{name}")(*arguments, stream))
    torch.cuda.synchronize()


@pytest.mark.parametrize("T", NUMBERS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("use_counter", [True, False])
def test_guided_solver_step(torch, T, size, offset, guided, use_counter):
    N, M = size
    rows = 2 * N if guided else N
    tensors = {
        **{"next_sample": device(torch, size, offset=offset), "table": device(torch, (4, 8))},
        **{"x0_out": device(torch, size, offset=offset)},
        **{"next_input": device(torch, (rows, M), T, offset)},
        **{"sample": device(torch, size, offset=offset)},
        **{"model_out": device(torch, (rows, M), T, offset)},
        **{"previous_x0": device(torch, size, offset=offset)},
        **{"earlier_x0": device(torch, size, offset=offset)},
        "guidance": device(torch, (N,)) if guided else None,
        "rescale": device(torch, (N,)) if guided else None,
        "seeds": torch.arange(N, device="cuda") - 1,  # the first one is the largest, 2^64 - 1
    }
    host = {name: on_host(tensor) for name, tensor in tensors.items()}
    host["seeds"] = host["seeds"].view(np.uint64)
    kernels.guided_solver_step(step=2, dtype=T, **host)
    counter = torch.tensor([2], dtype=torch.int32, device="cuda")
    args = kernels.GuidedSolverStepArgs(N=N, M=M, S=4, dtype=NUMBERS[T])
    for name, tensor in tensors.items():
        setattr(args, name, address(tensor))
    args.step_counter = address(counter) if use_counter else None
    launch(torch, "guided_solver_step", ctypes.byref(args), 0 if use_counter else 2)
    for name in ("next_sample", "x0_out", "next_input"):
        np.testing.assert_array_equal(on_host(tensors[name]), host[name])


def test_a_counter_outside_the_table_makes_nan(torch):
    x, out, table = (device(torch, (1, 64)), device(torch, (1, 64)), device(torch, (2, 8)))
    counter = torch.tensor([2], dtype=torch.int32, device="cuda")
    args = kernels.GuidedSolverStepArgs(N=1, M=64, S=2, dtype=0)
    named = {"next_sample": out, "sample": x, "model_out": x, "table": table}
    for name, tensor in {**named, "step_counter": counter}.items():
        setattr(args, name, address(tensor))
    launch(torch, "guided_solver_step", ctypes.byref(args), 0)
    assert torch.isnan(out).all()


@pytest.mark.parametrize("T", NUMBERS)
@pytest.mark.parametrize("size", [(1, 16384), (3, 777), (2, 65536)])
def test_guidance_rescale_factors(torch, T, size):
    """(M / 1024 + 4) units in each variance, so as much in the root of their quotient, and ends."""
    N, M = size
    m, guidance = device(torch, (2 * N, M), T), device(torch, (N,)).abs() * 5
    factors, phi = torch.empty(N, device="cuda"), torch.rand(N, device="cuda")
    launch(
        torch,
        "guidance_rescale_factors",
        *map(address, (factors, m, guidance, phi)),
        *(N, M, NUMBERS[T]),
    )
    expected = kernels.guidance_rescale_factors(
        on_host(m), guidance=on_host(guidance), phi=on_host(phi), dtype=T
    )
    np.testing.assert_allclose(on_host(factors), expected, rtol=(M / 1024 + 8) * UNIT)


@pytest.mark.parametrize("T", NUMBERS)
@pytest.mark.parametrize("size", [*SIZES, (2, 5_000_000), (600, 40)])
@pytest.mark.parametrize("halves", [1, 2])
def test_relative_change_and_its_determinism(torch, T, size, halves):
    images, M = size
    N = images * halves
    size = (N, M)
    now, before = device(torch, size, T), device(torch, size, T)
    library = kernels.cuda_library()
    size_bytes = library.bc_cuda_relative_change_workspace_bytes(N, M)
    runs = []
    for filler in (0, 255):
        workspace = torch.full((size_bytes,), filler, dtype=torch.uint8, device="cuda")
        changes = torch.empty(images + 1, device="cuda")
        pointers = (address(changes), address(changes) + 4 * images, address(now), address(before))
        tail = (images, N, M, NUMBERS[T], address(workspace), size_bytes)
        launch(torch, "relative_change", *pointers, *tail)
        runs.append(on_host(changes))
    np.testing.assert_array_equal(*runs)
    per_image, whole = kernels.relative_change(
        on_host(now), on_host(before), images=images, dtype=T
    )
    expected = np.append(per_image, np.float32(whole))
    np.testing.assert_allclose(runs[0], expected, rtol=18 * UNIT)  # 9 units on either side


@pytest.mark.parametrize("T", NUMBERS)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(2, 320, 16, 16), (1, 7, 5, 3), (2, 24, 9, 9), (1, 3, 1, 1)])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("two_terms", [True, False])
def test_scale_shift_residual(torch, T, layout, shape, offset, two_terms):
    N, C, H, W = shape
    size = shape if layout == "nchw" else (N, H, W, C)
    tensors = {name: device(torch, size, T, offset) for name in ("y", "x", "last")}
    tensors |= {name: device(torch, (C,)) for name in ("scale", "shift")}
    if two_terms:
        tensors |= {"before": device(torch, size, T, offset), "before_scale": device(torch, (C,))}
    host = {name: on_host(tensor) for name, tensor in tensors.items()}
    kernels.scale_shift_residual(layout=layout, dtype=T, **host)
    args = kernels.ScaleShiftResidualArgs(
        N=N, C=C, L=H * W, layout=kernels.LAYOUTS[layout], dtype=NUMBERS[T]
    )
    for name, tensor in tensors.items():
        setattr(args, name, address(tensor))
    launch(torch, "scale_shift_residual", ctypes.byref(args))
    np.testing.assert_array_equal(on_host(tensors["y"]), host["y"])
