"""Building, keeping and choosing back end B3, with compilers that are there, missing or broken."""

import shutil
import threading
import types

import jax
import jaxlib
import pytest
from numpy.fft import _pocketfft_umath

from asa_jax.async_tls import gather_library
from asa_jax.async_tls.ffi_gather import check_ffi_gather, chosen_backend
from asa_jax.async_tls.gather_library import (
    GatherUnavailableError,
    build,
    is_whole,
    library_path,
)

CPU = jax.devices("cpu")[0]
HOPPER = types.SimpleNamespace(platform="gpu", compute_capability="9.0", local_hardware_id=0)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Without compilers and with an empty cache; gives a function that makes a compiler."""

    def make_compiler(name, script):
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    (tmp_path / "bin").mkdir()
    for name in ("sleep", "sh", "cp"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    gather_library.load_library.cache_clear()
    yield make_compiler
    gather_library.load_library.cache_clear()


def test_the_file_is_of_one_source_jaxlib_and_capability(monkeypatch):
    names = [library_path("gpu", "9.0"), library_path("gpu", "10.0"), library_path("cpu", "")]
    assert names == [library_path("gpu", "9.0"), *names[1:]]
    monkeypatch.setattr(jaxlib, "__version__", "0.0.1")
    names += [library_path("gpu", "9.0")]
    assert len(set(names)) == 4


def test_without_a_compiler_auto_is_the_host_thread_and_an_explicit_choice_an_error(machine):
    line = "async_tls: back end host_thread (ffi_gather: no nvcc was found)"
    assert chosen_backend("auto", HOPPER) == ("host_thread", line)
    with pytest.raises(GatherUnavailableError, match="backend = 'ffi_gather': no nvcc was found"):
        chosen_backend("ffi_gather", HOPPER)
    with pytest.raises(GatherUnavailableError, match=r"no g\+\+ was found; use host_thread"):
        chosen_backend("ffi_gather", CPU)


def test_auto_without_a_gpu_and_what_is_not_to_be_chosen():
    assert chosen_backend("auto", CPU) == (
        "host_thread",
        "async_tls: back end host_thread (no GPU)",
    )
    assert chosen_backend("simulated", HOPPER)[0] == "simulated"
    assert chosen_backend("host_thread", HOPPER)[0] == "host_thread"


def test_a_compiler_that_fails_or_makes_something_else_is_told_in_one_line(machine):
    machine("g++", "echo 'in file a.h' >&2; echo 'a.h:3: error: no such thing' >&2; exit 1")
    with pytest.raises(GatherUnavailableError, match=r"g\+\+ failed: a.h:3: error: no such thing"):
        check_ffi_gather(CPU)
    path = library_path("cpu", "")
    assert list(path.parent.iterdir()) == []
    machine("g++", 'while [ "$1" != -o ]; do shift; done; echo text > "$2"')
    with pytest.raises(GatherUnavailableError, match=r"cannot be loaded .*; remove it") as raised:
        check_ffi_gather(CPU)
    assert str(path) in str(raised.value)


def test_a_library_without_the_calls_is_told(machine):
    machine("g++", f'while [ "$1" != -o ]; do shift; done; cp {_pocketfft_umath.__file__} "$2"')
    with pytest.raises(GatherUnavailableError, match=r"cannot be loaded .*undefined symbol: Asa"):
        check_ffi_gather(CPU)


@pytest.mark.parametrize("size", [0, 5, 40])
def test_a_damaged_library_is_built_anew(machine, size):
    """To load the first part of a library would end the process."""
    machine("g++", 'while [ "$1" != -o ]; do shift; done; echo "as long as a library" > "$2"')
    path = library_path("cpu", "")
    build("cpu", "", path)
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    assert not is_whole(path)
    with pytest.raises(GatherUnavailableError, match="cannot be loaded"):
        check_ffi_gather(CPU)
    assert is_whole(path) and path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_told(machine, tmp_path):
    machine("g++", "exit 0")
    (tmp_path / "cache").write_text("no folder")
    with pytest.raises(GatherUnavailableError, match="the gather cannot be built"):
        check_ffi_gather(CPU)


def test_who_builds_beside_others_never_shows_half_a_file(machine):
    machine(
        "g++",
        'while [ "$1" != -o ]; do shift; done; echo -n a >> "$2"; sleep 0.2; echo -n b >> "$2"',
    )
    path = library_path("cpu", "")
    builders = [threading.Thread(target=build, args=("cpu", "", path)) for _ in range(3)]
    for builder in builders:
        builder.start()
    seen = set()
    while any(builder.is_alive() for builder in builders):
        if path.exists():
            seen.add(path.read_bytes()[:-32])
    assert seen | {path.read_bytes()[:-32]} == {b"ab"} and is_whole(path)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.slow
def test_the_source_compiles_for_hopper(tmp_path):
    if shutil.which("nvcc", path="/usr/local/cuda/bin") is None and shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    build("gpu", "9.0", tmp_path / "gather.so")
    assert b"sm_90" in (tmp_path / "gather.so").read_bytes()


@pytest.mark.gpu
def test_auto_on_a_gpu_with_a_compiler_is_the_gather():
    device = jax.devices()[0]
    if device.platform != "gpu":
        pytest.skip("needs a GPU")
    assert chosen_backend("auto", device)[0] == "ffi_gather"
