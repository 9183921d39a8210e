"""Where back end B3 can be tested: on GPUs, and on CPUs with a thread in place of a side stream."""

import functools

import jax
import pytest

from asa_jax.async_tls.ffi_gather import check_ffi_gather
from asa_jax.async_tls.gather_library import GatherUnavailableError


@functools.cache
def why_not(device):
    """Why a device has no gather; None: it has one."""
    try:
        check_ffi_gather(device)
    except GatherUnavailableError as error:
        return str(error)
    return None


def can_gather():
    """Whether the device of the tests has a gather."""
    return why_not(jax.devices()[0]) is None


def device_or_skip(platform):
    """The first device of a platform; skips where there is none, or no compiler for it."""
    try:
        device = jax.devices(platform)[0]
    except RuntimeError:
        pytest.skip(f"needs a {platform}")
    # What is there and fails is to fail here too.
    if (reason := why_not(device)) and "was found" in reason:
        pytest.skip(reason)
    return device
