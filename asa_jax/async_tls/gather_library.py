"""The moves of back end B3: compiled from `native/`, kept in a cache, registered with XLA."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jaxlib

from asa_jax.errors import UserError

EXCHANGE, JOIN = "asa_pool_exchange", "asa_pool_join"
_HANDLERS = {EXCHANGE: "AsaExchange", JOIN: "AsaJoin"}
_FUNCTIONS = ("AsaOpen", "AsaClose", "AsaPin", "AsaUnpin", "AsaStore", "AsaDrain")
_SOURCE = Path(__file__).parent / "native" / "pool_exchange.cu"
_COMMON = ("-shared", "-std=c++17")
_COMPILER_SECONDS = 300
_DIGEST_BYTES = 32


class GatherUnavailableError(UserError):
    """Back end B3 cannot be built, loaded or trusted on this machine."""


@functools.cache
def load_library(platform: str, capability: str) -> ctypes.CDLL:
    """Builds the library unless it is in the cache, and registers its calls with XLA.

    Args:
        platform: "gpu", or "cpu" for the same protocol with a thread in place of the side stream.
        capability: compute capability of the GPU, as 9.0; empty for "cpu".

    Returns:
        The library, its functions typed.

    Raises:
        GatherUnavailableError: there is no compiler, or it or the library fails.
    """
    path = library_path(platform, capability)
    if not is_whole(path):
        build(platform, capability, path)
    try:
        library = ctypes.CDLL(str(path))
        for name in _FUNCTIONS:
            getattr(library, name).restype = ctypes.c_char_p
        targets = {name: getattr(library, handler) for name, handler in _HANDLERS.items()}
    except (OSError, AttributeError) as error:
        raise GatherUnavailableError(f"{path}: cannot be loaded ({error}); remove it") from None
    for name, function in targets.items():
        capsule = jax.ffi.pycapsule(function)
        jax.ffi.register_ffi_target(name, capsule, platform="CUDA" if platform == "gpu" else "cpu")
    return library


def library_path(platform: str, capability: str) -> Path:
    """Where the library is kept: source, jaxlib and compute capability are in the file's name."""
    digest = hashlib.sha256()
    for path in sorted(_SOURCE.parent.iterdir()):
        digest.update(path.read_bytes())
    digest.update(f"{jaxlib.__version__} {platform} {capability}".encode())
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "asa_jax" / "native" / f"pool_exchange_{digest.hexdigest()[:24]}.so"


def is_whole(path: Path) -> bool:
    """Whether a file is as `build` made it: to load a damaged one can end the process."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return content[-_DIGEST_BYTES:] == _digest(content[:-_DIGEST_BYTES])


def build(platform: str, capability: str, path: Path) -> None:
    """Compiles the library; the file appears when it is whole, so many processes may do so at once.

    Its digest stands behind the library, where loaders do not look.

    Args:
        platform: as for `load_library`.
        capability: as for `load_library`.
        path: that the library gets.

    Raises:
        GatherUnavailableError: there is no compiler, it fails, or the file cannot be written.
    """
    command = _compiler(platform, capability)
    # As a system folder, because XLA's headers are not free of warnings.
    command += [*_COMMON, "-isystem", jax.ffi.include_dir(), str(_SOURCE)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="build_") as folder:
            made = Path(folder) / path.name
            done = subprocess.run(
                [*command, "-o", str(made)],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_COMPILER_SECONDS,
            )
            if done.returncode:
                raise GatherUnavailableError(f"{command[0]} failed: {_first_error(done.stderr)}")
            made.write_bytes(made.read_bytes() + _digest(made.read_bytes()))
            made.replace(path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise GatherUnavailableError(f"the gather cannot be built: {error}") from None


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _compiler(platform: str, capability: str) -> list[str]:
    if platform == "cpu":
        return [_found("g++"), "-x", "c++", "-O2", "-fPIC", "-pthread"]
    architecture = "sm_" + capability.replace(".", "")
    return [_found("nvcc"), "-O3", f"-arch={architecture}", "-Xcompiler", "-fPIC"]


def _found(name: str) -> str:
    homes = [os.environ.get("CUDA_HOME") or "/usr/local/cuda"] if name == "nvcc" else []
    folders = os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes)])
    found = shutil.which(name, path=folders)
    if found is None:
        raise GatherUnavailableError(f"no {name} was found")
    return found


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "no message")
