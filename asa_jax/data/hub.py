"""Files of data sets on the Hugging Face hub, read over the network as they are needed.

They are named hf://datasets/OWNER/NAME/PATH, with globs in the path. The huggingface_hub package
finds the hub, a mirror of it and the user's token by its own environment variables.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from asa_jax.errors import ConfigError, DataError, UserError

SCHEME = "hf://"


class HubFile(NamedTuple):
    """A file on the hub; `content_id` changes with its content."""

    name: str
    size: int
    content_id: str


def is_hub_name(name: str) -> bool:
    """Whether a name or pattern is of the hub."""
    return name.startswith(SCHEME)


def find_hub_files(pattern: str) -> list[HubFile]:
    """Files that match a pattern such as hf://datasets/org/name/*.parquet, sorted.

    Raises:
        ConfigError: huggingface_hub is not installed.
        DataError: nothing matches, or the hub cannot be reached.
    """
    with hub_errors(pattern):
        found = _file_system().glob(pattern.removeprefix(SCHEME), detail=True)
    files = [
        HubFile(f"{SCHEME}{name}", info["size"], info["blob_id"])
        for name, info in sorted(found.items())
        if info["type"] == "file"
    ]
    if not files:
        raise DataError(f"{pattern}: no such file on the hub")
    return files


def open_hub_file(name: str) -> BinaryIO:
    """Opens a file on the hub; parts of it are fetched when they are read."""
    return _file_system().open(name.removeprefix(SCHEME), "rb")


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turns what goes wrong with the network into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each client library under the hub has classes of its own
        raise DataError(f"{name}: cannot be read from the hub ({error})") from None


def _file_system() -> Any:
    try:
        from huggingface_hub import HfFileSystem
    except ImportError:
        raise ConfigError("hf:// needs huggingface_hub: pip install 'asa-jax[hub]'") from None
    return HfFileSystem()
