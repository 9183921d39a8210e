"""Fetches packages with the clients that know where they are; nothing is installed."""

import subprocess
from pathlib import Path

from asa_jax.errors import DataError
from experiments.corpus.packages import Package


def fetch(package: Package, folder: Path) -> Path:
    """The archive of a package, downloaded unless it is there from before.

    Args:
        package: what to fetch.
        folder: keeps the archives.

    Raises:
        DataError: the client is missing or does not have the package.
    """
    found = _archives(package, folder)
    if not found:
        _download(package, folder)
        found = _archives(package, folder)
    if not found:
        raise DataError(f"{package.name}: {package.client} fetched nothing")
    return found[-1]


def _archives(package: Package, folder: Path) -> list[Path]:
    if package.client == "apt":
        return sorted(folder.glob(f"{package.name}_*.deb"))
    # npm pack calls @scope/name scope-name-VERSION.tgz.
    stem = package.name.removeprefix("@").replace("/", "-")
    return sorted(folder.glob(f"{stem}-[0-9]*.tgz"))


def _download(package: Package, folder: Path) -> None:
    # A partial file would be taken for a finished download, so it gets its place when it is whole.
    incoming = folder / "incoming"
    incoming.mkdir(parents=True, exist_ok=True)
    client = ["apt-get", "download", "-q"] if package.client == "apt" else ["npm", "pack"]
    try:
        done = subprocess.run(
            [*client, package.name], cwd=incoming, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise DataError(f"{package.name}: not available, {client[0]} is not installed") from None
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise DataError(f"{package.name}: not available ({client[0]}: {reason})")
    for path in _archives(package, incoming):
        path.rename(folder / path.name)
