"""Errors that a user can cause, each one line that names the field or file and what to do."""

import contextlib
import sys
from collections.abc import Iterator


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


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Prints a user error of the block as one line on stderr and exits with its code."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
