"""Flags of the commands that use a run or a model folder, and of the files that they take."""

from pathlib import Path

from absl import flags

from asa_jax.errors import ConfigError


def define_run_flags() -> None:
    """Defines `--workdir` and `--step`."""
    flags.DEFINE_string("workdir", None, "run directory, or model folder")
    flags.DEFINE_integer("step", None, "checkpoint to use; default: the newest", lower_bound=0)


def given_workdir() -> Path:
    """The folder that `--workdir` names.

    Raises:
        ConfigError: it names none.
    """
    if not flags.FLAGS.workdir:
        raise ConfigError(
            "--workdir: missing; give a run directory, such as --workdir=runs/tiny, "
            "or a model folder"
        )
    return Path(flags.FLAGS.workdir).expanduser()


def given_path(flag: str) -> Path | None:
    """The path that a flag names; None: the flag was not given."""
    path = flags.FLAGS[flag].value
    return None if path is None else Path(path).expanduser()


def given_files(flag: str) -> list[Path]:
    """The files that a flag names, of those that may be repeated.

    Raises:
        ConfigError: one does not exist.
    """
    given: list[str] = flags.FLAGS[flag].value or []
    paths = [Path(path).expanduser() for path in given]
    for path in paths:
        check_file(flag, path)
    return paths


def check_file(flag: str, path: Path) -> None:
    """Raises a ConfigError that names the flag unless there is such a file."""
    if not path.is_file():
        raise ConfigError(f"--{flag}={path}: no such file")


def given_output(flag: str) -> Path | None:
    """The file that a flag names, to be written; None: the flag was not given.

    Raises:
        ConfigError: no file can be there.
    """
    path = given_path(flag)
    if path is None:
        return None
    # The file is replaced whole, which must not happen to a device such as /dev/null.
    in_the_way = path.exists() and not path.is_file()
    if in_the_way or not path.absolute().parent.is_dir():
        raise ConfigError(f"--{flag}={path}: must name a file in a folder that exists")
    return path
