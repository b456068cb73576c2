"""The CUDA library compiles for every architecture and exports what the host library exports."""

import os
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from blockcache import kernels
from blockcache.kernels import _library

ROOT = Path(__file__).resolve().parents[2]
NEEDS_NVCC = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
FATBIN_MAGIC, PTX, ELF = 0xBA55ED50, 1, 2


def configure(build, *options, path=None):
    environment = {**os.environ, "PATH": path or os.environ["PATH"]}
    command = [shutil.which("cmake"), "-S", str(ROOT), "-B", str(build), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def embedded(library):
    """(kind, architecture) of every image in a library's fat binaries.

    A fat binary is a 16-byte header (magic, version, header size, body size) and its images; an
    image starts with kind and size, and has its architecture at byte 28. `cuobjdump --list-elf`
    prints the same, but not every toolkit has it.
    """
    data, images = library.read_bytes(), set()
    for match in re.finditer(re.escape(struct.pack("<I", FATBIN_MAGIC)), data):
        _, _, header, body = struct.unpack_from("<IHHQ", data, match.start())
        place = match.start() + header
        end = place + body
        while place < end <= len(data):
            kind, _, image_header, size = struct.unpack_from("<HHIQ", data, place)
            images.add((kind, struct.unpack_from("<I", data, place + 28)[0]))
            place += image_header + size
    return images


def exported(library):
    """Symbols a shared library defines for others."""
    command = ["nm", "-D", "--defined-only", str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[-1] for line in lines}


@pytest.fixture(scope="module")
def installed():
    """The folder of the two libraries as `pip install` built them, for all architectures."""
    library = _library._find("libblockcache_cuda.so")
    assert library is not None, "no CUDA library, though nvcc is here; install blockcache again"
    return library.parent


@NEEDS_NVCC
def test_the_plain_build_compiles_without_a_warning(tmp_path):
    """For one architecture, since the warnings are the same for all."""
    only = "-DBLOCKCACHE_CUDA_ARCHITECTURES=80-real"
    configured = configure(tmp_path, "-DBLOCKCACHE_CUDA=ON", only)
    assert configured.returncode == 0, configured.stderr
    command = ["cmake", "--build", tmp_path]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    assert "warning" not in made.stdout + made.stderr
    assert (ELF, 80) in embedded(tmp_path / "libblockcache_cuda.so")


@NEEDS_NVCC
def test_the_default_architectures_are_embedded_and_the_last_also_as_ptx(installed):
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    release = tuple(map(int, re.search(r"release (\d+)\.(\d+)", version.stdout).groups()))
    newest = [90] if release < (12, 8) else [90, 100, 120]
    wanted = {(ELF, sm) for sm in [80, 86, 89, *newest]} | {(PTX, newest[-1])}
    found = embedded(installed / "libblockcache_cuda.so")
    # Other images belong to the statically linked CUDA runtime.
    assert wanted <= found
    assert {sm for kind, sm in found if kind == PTX} == {newest[-1]}


@NEEDS_NVCC
def test_it_exports_a_twin_of_every_host_function_and_nothing_else(installed):
    host = exported(installed / "libblockcache_host.so")
    twins = {name.replace("bc_host_", "bc_cuda_") for name in host}
    extra = {"bc_cuda_relative_change_workspace_bytes"}
    assert exported(installed / "libblockcache_cuda.so") == twins | extra
    assert {f"bc_host_{name}" for name in _library._KERNELS} < host


@NEEDS_NVCC
def test_it_loads_and_checks_arguments_without_a_gpu(installed):
    library = kernels.cuda_library()
    assert library.bc_cuda_relative_change_workspace_bytes(0, 1) == 0
    small, large = (library.bc_cuda_relative_change_workspace_bytes(2, M) for M in (1, 10**9))
    assert small == 2 * 2 * 16
    assert large == 2 * 1025 * 16
    assert library.bc_cuda_relative_change(8, None, 8, 8, 1, 1, 1, 0, None, 0, None) == -6
    assert library.bc_cuda_relative_change(8, None, 16, 32, 2, 1, 1, 0, None, 0, None) == -3
    assert library.bc_cuda_relative_change(8, None, 16, 32, 1, 1, 1, 0, None, 0, None) == -7
    assert library.bc_cuda_guided_solver_step(None, 0, None) == -1
    assert b"invalid" in library.bc_error_string(1)  # cudaErrorInvalidValue


def test_without_a_toolkit_there_is_a_note_and_no_failure(tmp_path):
    if shutil.which("cmake") is None:
        pytest.skip("no cmake on PATH")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("cc", "c++", "g++", "gcc", "ld", "as", "ar", "make", "ninja"):
        if (tool := shutil.which(name)) is not None:
            (tools / name).symlink_to(tool)
    hidden = ["-DCMAKE_CUDA_COMPILER="]
    automatic = configure(tmp_path / "auto", *hidden, path=str(tools))
    assert automatic.returncode == 0, automatic.stderr
    assert "so the CUDA kernels are not built. The host kernels are." in automatic.stdout
    forced = configure(tmp_path / "on", *hidden, "-DBLOCKCACHE_CUDA=ON", path=str(tools))
    assert forced.returncode != 0
    assert "put nvcc on PATH or set CUDACXX" in forced.stderr
