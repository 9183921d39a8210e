"""Command lines: `--config` and `--workdir`, checked before jax is imported, and one-line errors.

A command parses its flags first and imports the heavy libraries after, so that a wrong flag is told
at once:

    if __name__ == "__main__":
        CONFIG, WORKDIR = exit_on_error(parse_run_flags)

    import jax
    ...
    if __name__ == "__main__":
        run_command(lambda: main(CONFIG, WORKDIR))
"""

import difflib
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from asa_jax.config import Config, config_from_dict
from asa_jax.errors import ConfigError, UserError, describe_os_error, in_one_line

PROJECT = Path(__file__).resolve().parent.parent
CONFIGS = PROJECT / "configs"


def parse_run_flags() -> tuple[Config, Path]:
    """Parses the command line of a command that works on a run: `--config` and `--workdir`.

    Returns:
        The checked configuration and the run directory, which need not exist yet.
    """
    flags.DEFINE_string("workdir", None, "run directory: checkpoints, metrics, plots")
    return parse_config_flag(), _workdir()


def parse_config_flag() -> Config:
    """Parses the command line of a command that needs `--config` alone.

    Returns:
        The checked configuration.
    """
    config = parse_optional_config_flag()
    if config is None:
        names = ", ".join(sorted(path.name for path in CONFIGS.glob("*.py") if _is_config(path)))
        raise ConfigError(f"--config: missing; give --config=configs/NAME.py, one of {names}")
    return config


def parse_optional_config_flag() -> Config | None:
    """As `parse_config_flag`, and None where there is no `--config`."""
    config_flags.DEFINE_config_file("config", None, "configs/NAME.py, or configs/NAME.py:ARM")
    flag = flags.FLAGS["config"]
    flag.parser = _ProjectConfigs(flag.parser)
    parse_arguments()
    values: ConfigDict | None = flags.FLAGS.config
    return None if values is None else config_from_dict(values.to_dict())


def parse_arguments() -> None:
    """Parses the command line into the flags that are defined.

    Raises:
        ConfigError: there is an argument that is no flag.
    """
    app.define_help_flags()
    stray = flags.FLAGS(sys.argv)[1:]
    if stray:
        raise ConfigError(f"{stray[0]!r}: unexpected argument; flags look like --name=value")


def exit_on_error[T](parse: Callable[[], T]) -> T:
    """Calls `parse`; whatever it raises becomes one line on stderr and an exit code.

    Args:
        parse: parses flags and does the checks that need no heavy import.

    Returns:
        What `parse` returns.
    """
    try:
        return parse()
    except SystemExit:
        sys.exit(0)  # --help, for which absl exits with 1
    except UserError as error:
        sys.exit(_fail(str(error), error.exit_code))
    except OSError as error:
        sys.exit(_fail(describe_os_error(error), 1))
    except Exception as error:
        # Config files run as code and absl wraps their tracebacks; the last line is the reason.
        lines = str(error).strip().splitlines() or [repr(error)]
        sys.exit(_fail(lines[-1], ConfigError.exit_code))


def run_command(
    main: Callable[[], int | None], leave: Callable[[int], NoReturn] = sys.exit
) -> NoReturn:
    """Runs a command and exits: its user errors become one line on stderr and their exit code.

    Args:
        main: the command; returns its exit code, None for 0.
        leave: ends the process with a code.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", force=True)
    # Orbax and tensorstore print, with tracebacks, errors of writing that they also raise.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    sys.unraisablehook = _print_unraisable
    code = _guarded(main)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
    leave(code)


def _guarded(main: Callable[[], int | None]) -> int:
    try:
        return main() or 0
    except BrokenPipeError:
        _discard_output()
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if told := in_one_line(error):
            return _fail(*told)
        # Printed here, because at a normal exit jax would wait for processes that may be gone.
        traceback.print_exc()
        return 1


def _print_unraisable(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code


def _discard_output() -> None:
    """Lets the interpreter flush a closed stdout at exit without a complaint."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _workdir() -> Path:
    if not flags.FLAGS.workdir:
        raise ConfigError("--workdir: missing; give a run directory, such as --workdir=runs/tiny")
    workdir = Path(flags.FLAGS.workdir).expanduser()
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"--workdir={workdir}: is not a directory")
    return workdir


class _ProjectConfigs(flags.ArgumentParser[Any]):
    """Loads config files, which run as code, from `configs/` alone."""

    def __init__(self, loader: flags.ArgumentParser[Any]) -> None:
        self._loader = loader

    def parse(self, path: Any) -> Any:
        """Returns what `get_config` of the file gives.

        Args:
            path: path relative to the project, or absolute; text behind a colon goes to
              `get_config` and picks an arm.

        Raises:
            ConfigError: the file lies elsewhere or does not exist.
        """
        name, colon, arm = path.partition(":")
        file = (PROJECT / name).resolve()
        if not file.is_relative_to(CONFIGS):
            raise ConfigError(f"--config={name}: must lie in {CONFIGS}")
        if not file.is_file():
            raise ConfigError(f"--config={name}: no such file in {CONFIGS}")
        if not _is_config(file):
            raise ConfigError(f"--config={name}: has no get_config")
        values = self._loader.parse(f"{file}{colon}{arm}")
        for argument in sys.argv:
            if field := re.match(r"--?(?:no)?config\.([^=]*)", argument):
                check_field(values, field[1])
        return values


def _is_config(file: Path) -> bool:
    return "get_config" in file.read_text(errors="replace")


def check_field(values: ConfigDict, field: str) -> None:
    """Raises a ConfigError that names what to choose from where `field` does not exist."""
    section: Any = values
    for name in field.split("."):
        known = sorted(section) if isinstance(section, ConfigDict) else []
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = (
                f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}"
            )
            raise ConfigError(f"--config.{field}: unknown field {name!r}; {hint}")
        section = section[name]
