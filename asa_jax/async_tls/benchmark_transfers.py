"""A model whose transfers can be left out, and be timed alone, for `benchmark`."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from asa_jax.async_tls.device_model import DeviceModel
from asa_jax.async_tls.offloaded_model import OffloadedModel
from asa_jax.async_tls.pool_exchange import REQUEST_HEADER, Pool, exchange, join
from asa_jax.async_tls.transfers import Backend

# A transfer that was left out.
_NOTHING = None


class SwitchedBackend:
    """See `transfers.Backend`: another one, of which blocks come from the host, or do not.

    Those that do not land at once, and what stands in their slots is whatever stood there before:
    numbers that mean nothing, at the price of all that a step does but to bring blocks and to place
    them.
    """

    def __init__(self, backend: Backend, model: "MeasuredModel") -> None:
        self._backend, self._model = backend, model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def start_fetch(self, rows: np.ndarray, blocks: np.ndarray) -> Any:
        """See `transfers.Backend`."""
        if not self._model.copies:
            return _NOTHING
        self._model.fetched.append((self._backend, rows, blocks))
        return self._backend.start_fetch(rows, blocks)

    def landed(self, transfer: Any) -> bool:
        """See `transfers.Backend`."""
        return transfer is _NOTHING or self._backend.landed(transfer)

    def place(self, transfer: Any, which: np.ndarray, rows: np.ndarray, slots: np.ndarray) -> None:
        """See `transfers.Backend`."""
        if transfer is not _NOTHING:
            self._backend.place(transfer, which, rows, slots)


class MeasuredModel(OffloadedModel):
    """An `OffloadedModel` over `SwitchedBackend`s.

    Attributes:
        copies: whether blocks come from the host.
        fetched: back end, rows and blocks of every transfer that was asked for.
    """

    def __init__(self, *args: Any) -> None:
        """As `OffloadedModel`."""
        super().__init__(*args)
        self.copies = True
        self.fetched: list[tuple[Backend, np.ndarray, np.ndarray]] = []

    def leave_transfers_out(self) -> None:
        """From now on no block comes from the host."""
        self.copies = False

    def transfers_of(self, step: Callable[[], Any], number: int) -> list[Any]:
        """Takes steps, and gives what they asked for."""
        self.fetched = []
        for _ in range(number):
            step()
        return self.fetched

    def seconds_alone(self, fetched: list[tuple[Backend, np.ndarray, np.ndarray]]) -> float:
        """Seconds that transfers take which were asked for once, with nothing beside them.

        A layer's is started while those of the layer before are under way, as in a step.
        """
        jax.effects_barrier()
        begin = time.perf_counter()
        under_way: list[tuple[Backend, Any]] = []
        for backend, rows, blocks in fetched:
            under_way.append((backend, backend.start_fetch(rows, blocks)))
            if len(under_way) > 2:
                _wait(*under_way.pop(0))
        for one in under_way:
            _wait(*one)
        return time.perf_counter() - begin

    def close(self) -> None:
        """Gives up caches and pools."""
        self._end()

    def _new_backend(self, *args: Any) -> Any:
        return SwitchedBackend(super()._new_backend(*args), self)


class MeasuredDeviceModel(DeviceModel):
    """A `DeviceModel` whose exchanges can move nothing."""

    def leave_transfers_out(self) -> None:
        """From now on slots hold whatever stands there: the host has no block to give."""
        texts = self._texts
        texts.sparse = [one._replace(source=one.source.at[2].set(0)) for one in texts.sparse]

    def transfers_of(self, step: Callable[[], Any], number: int) -> list[Any]:
        """Takes steps, and gives the requests of all layers at each."""
        requests = []
        for _ in range(number):
            step()
            # Copies: the mailboxes themselves are given away in the next step.
            requests.append([np.array(one.pool.mailbox) for one in self._texts.sparse])
        return requests

    def seconds_alone(self, requests: list[Any]) -> float:
        """Seconds that transfers take which were asked for once, with nothing beside them."""
        requests = jax.device_put(requests)
        pools = [one.pool for one in self._texts.sparse]
        seconds = 0.0
        for _ in range(2):  # the first time it is compiled
            jax.block_until_ready(pools)
            for host in self._texts.hosts:
                host.drain()
            begin = time.perf_counter()
            for of_step in requests:
                pools = _move(pools, of_step)
            jax.block_until_ready(pools)
            seconds = time.perf_counter() - begin
        self._texts.sparse = [
            one._replace(pool=pool) for one, pool in zip(self._texts.sparse, pools, strict=True)
        ]
        return seconds


@functools.partial(jax.jit, donate_argnums=0)
def _move(pools: list[Pool], requests: list[jax.Array]) -> list[Pool]:
    under_way = []
    for pool, request in zip(pools, requests, strict=True):
        source, moves = jnp.split(request, [REQUEST_HEADER])
        under_way.append(exchange(pool, source, moves))
    return [join(pool) for pool in under_way]


def _wait(backend: Backend, transfer: Any) -> None:
    if not backend.landed(transfer):
        backend.wait(transfer)
