"""The command line of `asa_jax.interop.export`, checked without jax."""

from pathlib import Path
from typing import NamedTuple

from absl import flags

from asa_jax.errors import ConfigError
from asa_jax.flags import parse_arguments
from asa_jax.trained_run import is_model_folder, read_run_config

DTYPES = ("float32", "bfloat16", "float16")
GIGABYTE = 10**9


class Options(NamedTuple):
    """What to export.

    Attributes:
        workdir: of the run; None: a GGUF file is exported.
        gguf: the GGUF file; None: a run is exported.
        step: of the checkpoint; None: the newest.
        output: the folder to write.
        dtype: of the tensors.
        max_file_bytes: of one safetensors file, unless a single tensor is larger.
        overwrite: whether a model in `output` is replaced.
    """

    workdir: Path | None
    gguf: Path | None
    step: int | None
    output: Path
    dtype: str
    max_file_bytes: int
    overwrite: bool


def parse_options() -> Options:
    """Parses and checks the command line.

    Raises:
        ConfigError: a flag is missing or wrong, or --output is there already.
        CheckpointError: --workdir holds no run.
    """
    flags.DEFINE_string("workdir", None, "run directory")
    flags.DEFINE_string("gguf", None, "GGUF file of a Llama model, instead of --workdir")
    flags.DEFINE_integer("step", None, "checkpoint to export; default: the newest", lower_bound=0)
    flags.DEFINE_string("output", None, "folder to write")
    flags.DEFINE_enum("dtype", DTYPES[0], DTYPES, "of the tensors; float32 changes nothing")
    flags.DEFINE_float("max_file_gb", 5.0, "size of one file at most, in 10^9 bytes", 1e-6)
    flags.DEFINE_bool("overwrite", False, "replace a model in --output")
    parse_arguments()
    given = flags.FLAGS
    workdir, gguf, output = (_path(flag) for flag in (given.workdir, given.gguf, given.output))
    if output is None:
        raise ConfigError("--output: missing; give a folder to write")
    if (workdir is None) == (gguf is None):
        raise ConfigError("--workdir, --gguf: give one of them")
    check_output(output, overwrite=given.overwrite)
    if workdir is not None and is_model_folder(workdir):
        raise ConfigError(f"--workdir={workdir}: is a model folder already; give a run directory")
    if workdir is not None:
        read_run_config(workdir)
    max_bytes = int(given.max_file_gb * GIGABYTE)
    return Options(workdir, gguf, given.step, output, given.dtype, max_bytes, given.overwrite)


def _path(flag: str | None) -> Path | None:
    return Path(flag).expanduser() if flag else None


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raises a ConfigError where a folder is in the way that may not be replaced."""
    if not output.exists():
        return
    if not overwrite:
        raise ConfigError(f"--output={output}: exists; give another folder, or --overwrite")
    # A run has a config.json too, and must not be lost.
    if not output.is_dir() or output.is_symlink() or not is_model_folder(output):
        raise ConfigError(f"--output={output}: is no model folder, so it is not overwritten")
    if any(path.is_dir() for path in output.iterdir()):
        raise ConfigError(f"--output={output}: holds other folders, so it is not overwritten")
