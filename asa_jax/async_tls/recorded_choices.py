"""The blocks that a model asks for while it decodes, and where pools of other sizes find them.

What is in a pool changes when blocks travel and nothing else. So a text is decoded once, and the
lists that its layers asked for are put to engines whose pools have other sizes, and whose tokens
are single zeros.
"""

import itertools
from typing import Any

import numpy as np

from asa_jax.async_tls.engine import Engine
from asa_jax.async_tls.offloaded_model import OffloadedModel
from asa_jax.async_tls.settings import AsyncTLSConfig
from asa_jax.async_tls.simulated import SimulatedBackend


class RecordingEngine(Engine):
    """An `Engine` that remembers what it was asked for.

    Attributes:
        asked: lists int32 [B, K, num_blocks + 3], in order, -1 for none.
    """

    def __init__(self, *args: Any) -> None:
        """As `Engine`."""
        super().__init__(*args)
        self.asked: list[np.ndarray] = []

    def prefetch(self, blocks: np.ndarray) -> None:
        """See `Engine.prefetch`; `fetch` comes here too."""
        self.asked.append(blocks.copy())
        super().prefetch(blocks)


class RecordingModel(OffloadedModel):
    """An `OffloadedModel` of `RecordingEngine`s."""

    _engine_type = RecordingEngine

    @property
    def asked(self) -> np.ndarray:
        """Lists of the first row, int32 [lists, sparse layers, K, num_blocks + 3].

        One for each step, and in the lagged form one more: the first step asks for its own blocks
        and, as all others do, for those of the next.
        """
        engines = [engine for engine in self._engines if isinstance(engine, RecordingEngine)]
        return np.stack([[blocks[0] for blocks in engine.asked] for engine in engines], axis=1)


def found_blocks(
    asked: np.ndarray,
    cfg: AsyncTLSConfig,
    num_tokens: int,
    *,
    num_slots: int,
    lagged: bool,
) -> tuple[np.ndarray, Engine]:
    """Which of the blocks that were asked for are in a pool at that time.

    Args:
        asked: of `RecordingModel`.
        cfg: sizes with which it was decoded.
        num_tokens: of the prompt.
        num_slots: of a row in the pool, at least `slots_for(cfg)`.
        lagged: whether it was decoded so.

    Returns:
        bool, the shape of `asked`, and the engine of all layers, with a sequence for each.
    """
    num_lists, layers, heads, _ = asked.shape
    num_blocks = -(-(num_tokens + num_lists) // cfg.block_size)
    backend = SimulatedBackend(
        layers * heads, num_blocks, num_slots, cfg.block_size, 1, np.dtype(np.float16)
    )
    engine = Engine(cfg, layers, heads, num_blocks, backend)
    prompt = np.zeros((layers, heads, num_blocks * cfg.block_size, 1), np.float16)
    engine.load(prompt, np.full(layers, num_tokens))
    found = np.zeros(asked.shape, bool)
    for number, blocks in enumerate(asked):
        if not (lagged and number == 1):  # the second list of the first step
            engine.append(prompt[:, :, 0])
            engine.commit()
        found[number] = engine.slots_of(blocks) >= 0
        ask = engine.prefetch if lagged and number else engine.fetch
        ask(blocks)
    return found, engine


def repeated_blocks(asked: np.ndarray) -> np.ndarray:
    """Which blocks stood on the list before too, bool [lists, ...]; none of the first list did."""
    repeated = np.zeros(asked.shape, bool)
    for number, (before, now) in enumerate(itertools.pairwise(asked), 1):
        same = (now[..., None] == before[..., None, :]).any(-1)
        repeated[number] = same & (now >= 0)
    return repeated
