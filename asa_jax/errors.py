"""Errors that a user can cause, each one line that names the field or file and what to do."""

import contextlib
import errno
import sys
from collections.abc import Iterator

# Failures of the machine, or of a path that was given, and not of the program.
_MACHINE_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS,
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
)  # fmt: skip


class UserError(Exception):
    """An error caused by the input; commands print its single line and exit with `exit_code`."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        """Keeps the message on a single line.

        Args:
            message: what is wrong, where (field, file, offset) and what to do.
        """
        super().__init__(" ".join(message.split()))


class ConfigError(UserError):
    """A wrong flag, config field or combination of them: found before any work starts."""

    exit_code = 2


class DataError(UserError):
    """Text, tokenizer or token shards that cannot be used as they are."""


class CheckpointError(UserError):
    """A checkpoint that is damaged, missing or made for something else."""


class ImportedModelError(UserError):
    """A model folder of another program that cannot be imported: found before any array exists."""

    exit_code = 2


def in_one_line(error: BaseException) -> tuple[str, int] | None:
    """The line that tells what stopped a command, and its exit code.

    Args:
        error: what the command raised.

    Returns:
        The line without "error: ", and the code; None where the program itself is wrong, which
        takes a traceback.
    """
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, OSError) and error.errno in _MACHINE_ERRORS:
        return describe_os_error(error), 1
    return None


def describe_os_error(error: OSError) -> str:
    """File and reason."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Prints the line of an error of the block on stderr and exits with its code."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        told = in_one_line(error)
        if told is None:
            raise
        print(f"error: {told[0]}", file=sys.stderr)
        sys.exit(told[1])
