"""Finding and refusing libraries, and every refusal of the C ABI with its text."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from blockcache import kernels
from blockcache.kernels import _library


@pytest.fixture
def fresh_loader():
    """Forgets loaded libraries before and after, so that the environment is read again."""
    _library._load_host.cache_clear()
    _library.cuda_library.cache_clear()
    yield
    _library._load_host.cache_clear()
    _library.cuda_library.cache_clear()


def call(**changes):
    """bc_host_guided_solver_step on 2 samples of 4 elements, with some arguments changed."""
    memory = np.zeros(256, np.float32)
    place = memory.ctypes.data
    fields = {
        **{"next_sample": place, "sample": place + 32, "model_out": place + 64},
        **{"table": place + 128, "N": 2, "M": 4, "S": 1, "dtype": 0, "step": 0},
    }
    offsets = {name: place + value for name, value in changes.pop("at", {}).items()}
    fields |= {**changes, **offsets}
    step = fields.pop("step")
    args = kernels.GuidedSolverStepArgs(**fields)
    return kernels.host_library().bc_host_guided_solver_step(args, step)


def test_versions_match():
    assert kernels.host_library().bc_abi_version() == kernels.ABI_VERSION


def test_a_missing_library_is_found_missing_only_when_it_is_needed(
    fresh_loader, tmp_path, monkeypatch
):
    monkeypatch.setenv(_library.DIRECTORY_VARIABLE, str(tmp_path))
    assert not kernels.host_available()
    assert kernels.cuda_library() is None
    with pytest.raises(kernels.KernelError, match=r"found none; run `pip install \.`"):
        kernels.host_library()


def test_a_file_that_is_no_library_is_refused(fresh_loader, tmp_path, monkeypatch):
    (tmp_path / "libblockcache_host.so").write_text("not a library")
    monkeypatch.setenv(_library.DIRECTORY_VARIABLE, str(tmp_path))
    with pytest.raises(kernels.KernelError, match="expected a library this machine can load"):
        kernels.host_available()


@pytest.mark.parametrize(
    ("source", "version"), [("int bc_abi_version(void) { return 77; }", "77"), ("", "none")]
)
def test_another_abi_version_is_refused(fresh_loader, tmp_path, monkeypatch, source, version):
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc to make a library of another version")
    (tmp_path / "other.c").write_text(source)
    output = tmp_path / "libblockcache_host.so"
    command = [compiler, "-shared", "-fPIC", str(tmp_path / "other.c"), "-o", str(output)]
    subprocess.run(command, check=True)
    monkeypatch.setenv(_library.DIRECTORY_VARIABLE, str(tmp_path))
    with pytest.raises(kernels.KernelError, match=f"ABI version 4, got {version} in"):
        kernels.host_available()


@pytest.mark.parametrize(
    ("changes", "code", "text"),
    [
        ({}, 0, "done"),
        ({"sample": None}, -1, "NULL"),
        ({"dtype": 3}, -2, "dtype must be"),
        ({"N": 0}, -3, "every size must be at least 1"),
        ({"M": -4}, -3, "every size must be at least 1"),
        ({"N": 1 << 40, "M": 1 << 40}, -3, "at most 2^48"),
        ({"S": 0}, -3, "every size must be at least 1"),
        ({"at": {"sample": 33}}, -4, "not aligned"),
        ({"step": 1}, -5, "0..S-1"),
        ({"step": -1}, -5, "0..S-1"),
        ({"at": {"sample": 4}}, -6, "shares memory"),
        ({"at": {"x0_out": 0}}, -6, "shares memory"),
        ({"at": {"table": 0}}, -6, "shares memory"),
        ({"at": {"rescale": 8}}, -6, "shares memory"),
        ({"at": {"sample": 0}}, 0, "done"),
        ({"at": {"next_input": 64}}, 0, "done"),
        ({"at": {"next_input": 64}, "dtype": 1}, 0, "done"),
        ({"at": {"next_input": 32}, "dtype": 1}, -6, "shares memory"),
    ],
)
def test_solver_arguments_are_refused_with_a_reason(changes, code, text):
    assert call(**changes) == code
    assert text in kernels.host_library().bc_error_string(code).decode()


def test_a_step_counter_replaces_the_step_and_is_checked_too():
    counter = ctypes.c_int32(0)
    assert call(step_counter=ctypes.addressof(counter), step=99) == 0
    counter.value = 1
    assert call(step_counter=ctypes.addressof(counter), step=0) == -5


def test_reductions_and_residual_refuse_what_they_must():
    library = kernels.host_library()
    f = np.ones(64, np.float32)
    at = f.ctypes.data
    change = library.bc_host_relative_change
    assert change(None, None, at, at + 64, 1, 1, 4, 0) == -1
    assert change(at, None, at, at + 64, 1, 1, 4, 0) == -6
    assert change(at + 128, None, at + 1, at + 64, 1, 1, 4, 0) == -4
    assert change(at + 128, None, at, at + 64, 1, 1, 4, 0) == 0
    for images in (0, -1, 3, 8):
        assert change(at + 128, None, at, at + 64, images, 4, 1, 0) == -3
    rescale = library.bc_host_guidance_rescale_factors
    assert rescale(at, at, at + 128, at + 192, 1, 4, 0) == -6
    assert rescale(at + 192, at, at + 128, at + 192, 1, 4, 0) == -6
    assert rescale(at + 64, at, None, at + 192, 1, 4, 0) == -1
    assert rescale(at + 64, at, at + 128, None, 1, 4, 0) == -1
    assert rescale(at + 64, at, at + 128, at + 193, 1, 4, 0) == -4
    assert rescale(at + 64, at, at + 128, at + 192, 1, 4, 7) == -2
    sizes = {"N": 1, "C": 2, "L": 2, "layout": 0, "dtype": 0}
    where = {"y": at, "x": at + 16, "last": at + 32, "scale": at + 64, "shift": at + 80}
    for changes, code in [({}, 0), ({"layout": 2}, -8), ({"x": at + 4}, -6), ({"L": 0}, -3)]:
        args = kernels.ScaleShiftResidualArgs(**{**sizes, **where, **changes})
        assert library.bc_host_scale_shift_residual(args) == code


def results_of_every_kernel():
    """What all host kernels make of the same random numbers, in every type."""
    rng, made = np.random.default_rng(0), []
    x, h = rng.standard_normal((2, 3, 5, 7, 11), np.float32)
    table, rows = rng.standard_normal((1, 8), np.float32), rng.standard_normal((2, 5), np.float32)
    seeds = np.arange(3, dtype=np.uint64)
    for T in (np.float32, np.float16, ml_dtypes.bfloat16):
        m = rng.standard_normal((6, 5, 7, 11)).astype(T)
        out, x0, following = np.empty_like(x), np.empty_like(x), np.empty_like(m)
        factors = kernels.guidance_rescale_factors(m, guidance=5.0, phi=0.7)
        kernels.guided_solver_step(
            out, sample=x, model_out=m, table=table, step=0, x0_out=x0, previous_x0=h,
            earlier_x0=x, next_input=following, guidance=5.0, rescale=factors, seeds=seeds,
        )  # fmt: skip
        per_image, whole = kernels.relative_change(m, following, images=3)
        residuals = [np.empty_like(m), np.empty_like(m)]
        for layout, y in zip(("nchw", "nhwc"), residuals, strict=True):
            shape = m.shape if layout == "nchw" else (6, 7, 11, 5)
            tensors = {"x": m.reshape(shape), "last": following.reshape(shape)}
            kernels.scale_shift_residual(
                y.reshape(shape), scale=rows[0], shift=rows[1], layout=layout, **tensors
            )
        made += [factors, out, x0, following, per_image, np.float32(whole), *residuals]
    return [np.asarray(each).tobytes() for each in made]


def test_every_instruction_set_gives_the_same_bits(fresh_loader, tmp_path, monkeypatch):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build for the oldest machines")
    installed = results_of_every_kernel()
    source = Path(__file__).resolve().parents[2] / "kernels" / "host.cpp"
    library = tmp_path / "libblockcache_host.so"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off"]
    subprocess.run(
        [compiler, *flags, "-DBLOCKCACHE_BASELINE", str(source), "-o", str(library)], check=True
    )
    monkeypatch.setenv(_library.DIRECTORY_VARIABLE, str(tmp_path))
    _library._load_host.cache_clear()
    assert results_of_every_kernel() == installed


def test_unknown_codes_have_a_text():
    assert kernels.host_library().bc_error_string(-99) == b"unknown code"
    with pytest.raises(kernels.KernelError, match=r"^name: unknown code \(code -99\)$") as caught:
        kernels.check(kernels.host_library(), "name", -99)
    assert caught.value.code == -99


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample": np.ones((2, 4))}, "sample: expected float32, got float64"),
        ({"sample": np.ones((2, 5), np.float32)}, r"sample: expected shape \(2, 4\)"),
        ({"sample": np.ones((4, 2), np.float32).T}, "sample: expected a C-contiguous"),
        ({"model_out": np.ones((2, 4), np.int8)}, "model_out: expected one of .* got int8"),
        ({"model_out": np.ones((2, 4), np.uint16)}, "pass dtype='bfloat16' for bfloat16 bits"),
        ({"guidance": 2.0}, r"model_out: expected shape \(4, 4\), got \(2, 4\)"),
        ({"table": np.ones((3, 7), np.float32)}, r"table: expected shape \(3, 8\)"),
        ({"next_input": np.ones((2, 4), np.float16)}, "expected float16, got float32"),
    ],
)
def test_arrays_are_refused_by_name(changes, message):
    ones = np.ones((2, 4), np.float32)
    good = {"sample": ones, "model_out": ones, "table": np.zeros((3, 8), np.float32)}
    with pytest.raises(kernels.KernelError, match=message):
        kernels.bind_guided_solver_step(np.empty_like(ones), **{**good, **changes})


def test_an_output_must_be_writable_and_apart():
    ones, table = np.ones((2, 4), np.float32), np.zeros((1, 8), np.float32)
    frozen = ones.copy()
    frozen.flags.writeable = False
    with pytest.raises(kernels.KernelError, match="next_sample: expected a writable array"):
        kernels.bind_guided_solver_step(frozen, sample=ones, model_out=ones, table=table)
    memory = np.ones(12, np.float32)
    out, shifted = memory[:8].reshape(2, 4), memory[4:].reshape(2, 4)
    with pytest.raises(kernels.KernelError, match="shares memory with another tensor"):
        kernels.bind_guided_solver_step(out, sample=shifted, model_out=ones, table=table)
