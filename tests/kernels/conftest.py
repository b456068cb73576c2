"""The host library for every test here: the installed one, else one built once per run."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from blockcache import kernels
from blockcache.kernels import _library

SOURCES = Path(__file__).resolve().parents[2] / "kernels"
FLAGS = "-std=c++17 -O3 -fPIC -shared -fvisibility=hidden -ffp-contract=off -fno-trapping-math"
WARNINGS = "-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Werror"


@pytest.fixture(scope="session", autouse=True)
def host_library_directory(tmp_path_factory):
    """Where the host library lies; None for the installed one."""
    if kernels.host_available():
        yield None
        return
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("blockcache is not installed and there is no g++ to build its host library")
    directory = tmp_path_factory.mktemp("kernels")
    source, library = SOURCES / "host.cpp", directory / "libblockcache_host.so"
    command = [compiler, *FLAGS.split(), *WARNINGS.split(), str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    os.environ[_library.DIRECTORY_VARIABLE] = str(directory)
    _library._load_host.cache_clear()
    yield directory
    del os.environ[_library.DIRECTORY_VARIABLE]
    _library._load_host.cache_clear()
