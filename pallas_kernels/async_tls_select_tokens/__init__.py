"""Choice of tokens in listed blocks of a cache by labels of their keys, level 2 of AsyncTLS."""

from pallas_kernels.async_tls_select_tokens.api import async_tls_select_tokens

__all__ = ["async_tls_select_tokens"]
