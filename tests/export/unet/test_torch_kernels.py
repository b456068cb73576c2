"""The reference's kernels on torch tensors: right arguments, and torch where they do not fit."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from blockcache.export.measure import change  # noqa: E402
from blockcache.export.unet import torch_kernels  # noqa: E402
from blockcache.export.unet.cached_unet import CacheableBlock, guided_output  # noqa: E402


@pytest.fixture
def on_twin(twin_library, monkeypatch):
    """CUDA's kernels, on host tensors."""

    def library_for(*tensors):
        return twin_library if torch_kernels._fits(*tensors) else None

    monkeypatch.setattr(torch_kernels, "_library_for", library_for)
    monkeypatch.setattr(torch_kernels, "_stream", lambda tensor: 0)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("halves", [1, 2])
def test_the_change_is_the_profiles(on_twin, dtype, halves):
    fresh, previous = (normal(3 * halves, 8, 5, 5, seed=s, dtype=dtype) for s in (0, 1))
    ours = torch_kernels.relative_change(fresh, previous, 3)
    d, m = (
        (t.double().abs().reshape(halves, 3, -1).sum((0, 2))) for t in (fresh - previous, fresh)
    )
    # The kernel takes the difference in float32, torch in dtype: half a unit of it each.
    np.testing.assert_allclose(ours, (d / m).numpy(), rtol=1e-6 + torch.finfo(dtype).eps)
    assert ours.dtype == np.float64


def test_the_profile_uses_it_and_is_the_same_without(on_twin, monkeypatch):
    fresh, previous = normal(4, 8, 5, 5), normal(4, 8, 5, 5, seed=1)
    seen = []
    real = torch_kernels.relative_change
    monkeypatch.setattr(
        torch_kernels, "relative_change", lambda *args: seen.append(args) or real(*args)
    )
    with_kernel = change.relative_change(fresh, previous, 2)
    monkeypatch.setattr(torch_kernels, "_library_for", lambda *tensors: None)
    np.testing.assert_allclose(change.relative_change(fresh, previous, 2), with_kernel, rtol=1e-6)
    assert len(seen) == 2


class Inner(torch.nn.Module):
    """A block whose output is its input and something per call."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, hidden_states):
        self.calls += 1
        return (hidden_states + normal(*hidden_states.shape, seed=self.calls),)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("outputs", [1, 2])
@torch.no_grad()
def test_a_reused_block_is_the_same_through_the_kernel(on_twin, monkeypatch, layout, outputs):
    x = normal(2, 6, 5, 3).to(memory_format=layout)
    block = CacheableBlock(Inner(), outputs)
    for _ in range(2):
        block(x)
    block.kept = tuple(each.to(memory_format=layout) for each in block.kept)
    block.recompute = False
    block.coefficients = normal(outputs + 1, 6, seed=9)
    (ours,) = block(x)
    assert ours.stride() == x.stride()
    monkeypatch.setattr(torch_kernels, "_library_for", lambda *tensors: None)
    (plain,) = block(x)
    # A handful of float32 roundings of numbers below 32.
    torch.testing.assert_close(ours, plain, rtol=0, atol=6 * 32 * 2.0**-24)


def test_torch_does_what_the_kernels_cannot(on_twin):
    x, row = normal(2, 6, 4, 4), normal(2, 6, seed=1)
    assert torch_kernels.scale_shift_residual(x, [x], None) is None
    assert torch_kernels.scale_shift_residual(x, [x.double()], row) is None
    assert (
        torch_kernels.scale_shift_residual(x, [x.to(memory_format=torch.channels_last)], row)
        is None
    )
    gaps = normal(2, 12, 4, 4)[:, ::2]
    assert torch_kernels.scale_shift_residual(gaps, [gaps], row) is None
    assert torch_kernels.relative_change(x.double(), x.double(), 2) is None
    learned = x.clone().requires_grad_()
    assert torch_kernels.scale_shift_residual(learned, [x], row) is None
    fitted = row.clone().requires_grad_()
    assert torch_kernels.scale_shift_residual(x, [x], fitted) is None
    with torch.no_grad():
        assert torch_kernels.scale_shift_residual(learned, [x], fitted) is not None


def test_host_tensors_are_left_to_torch():
    x = normal(2, 6, 4, 4)
    assert torch_kernels.relative_change(x, x, 2) is None
    assert torch_kernels.scale_shift_residual(x, [x], normal(2, 6)) is None


def test_a_model_comes_home_from_the_gpu():
    module = torch.nn.Linear(2, 2)
    with torch_kernels.on_gpu(module) as device:
        assert next(module.parameters()).device.type == device.type
    assert next(module.parameters()).device.type == "cpu"


@pytest.mark.parametrize("rescale", [0.0, 0.4, 1.0])
def test_the_references_guidance_is_diffusers(rescale):
    pytest.importorskip("diffusers")
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    output = normal(4, 4, 8, 8)
    u, c = output.chunk(2)
    wanted = rescale_noise_cfg(u + 7.5 * (c - u), c, rescale)
    torch.testing.assert_close(guided_output(output, 7.5, rescale), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
def test_the_kernels_on_a_gpu_equal_torch():
    if not torch.cuda.is_available() or torch_kernels.kernels.cuda_library() is None:
        pytest.skip("no CUDA device, or the CUDA library is not installed")
    x, a, b = (normal(4, 32, 16, 16, seed=s).cuda() for s in range(3))
    rows = normal(3, 32, seed=4)
    fused = torch_kernels.scale_shift_residual(x, [a, b], rows)
    scale, before, shift = (row.cuda()[:, None, None] for row in rows)
    torch.testing.assert_close(fused, x + scale * a + before * b + shift, rtol=1e-5, atol=1e-5)
    expected = (a - b).abs().reshape(2, 2, -1).sum((0, 2)) / a.abs().reshape(2, 2, -1).sum((0, 2))
    ours = torch_kernels.relative_change(a, b, 2)
    np.testing.assert_allclose(ours, expected.cpu().numpy(), rtol=1e-5)
