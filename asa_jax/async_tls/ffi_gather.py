"""Whether back end B3 works on a machine, and which back end `auto` is there.

B3 moves blocks between a pool and pinned memory of the host on a stream of its own:
`pool_exchange`.
"""

import jax

from asa_jax.async_tls.gather_library import GatherUnavailableError
from asa_jax.async_tls.pool_exchange import exchange_works
from asa_jax.errors import UserError


def check_ffi_gather(device: jax.Device) -> None:
    """Moves a few blocks to a device and back and compares them.

    Raises:
        GatherUnavailableError: B3 cannot be built, does not work or brings something else.
    """
    try:
        same = exchange_works(device)
    except GatherUnavailableError:
        raise
    except (UserError, RuntimeError) as error:
        raise GatherUnavailableError(f"its self-check failed: {error}") from None
    if not same:
        raise GatherUnavailableError("its self-check brought other numbers than the host holds")


def chosen_backend(asked: str, device: jax.Device) -> tuple[str, str]:
    """What `backend=auto` means on this machine, and why.

    Args:
        asked: one of `settings.BACKENDS`.
        device: that decodes.

    Returns:
        The back end, and a line for people.

    Raises:
        GatherUnavailableError: ffi_gather was asked for and does not work.
    """
    if asked == "auto" and device.platform != "gpu":
        return "host_thread", "async_tls: back end host_thread (no GPU)"
    if asked not in ("auto", "ffi_gather"):
        return asked, f"async_tls: back end {asked}"
    try:
        check_ffi_gather(device)
    except GatherUnavailableError as error:
        if asked == "ffi_gather":
            raise GatherUnavailableError(
                f"config.async_tls.backend = 'ffi_gather': {error}; use host_thread"
            ) from None
        return "host_thread", f"async_tls: back end host_thread (ffi_gather: {error})"
    return "ffi_gather", "async_tls: back end ffi_gather"
