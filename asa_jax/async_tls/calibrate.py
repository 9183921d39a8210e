"""Finds the channels of keys that labels hold, from sample text, and saves them with the model.

    python -m asa_jax.async_tls.calibrate --workdir=models/SmolLM2-135M --text=texts/train/emma.txt

writes WORKDIR/async_tls_channels.safetensors, which belongs to these weights alone. What is
measured: `calibration.py`.

Exit codes: 0 done; 1 the model or a file cannot be used; 2 a flag is wrong; 130 Ctrl-C.
"""

from asa_jax.async_tls.calibrate_options import Options, parse_options
from asa_jax.flags import exit_on_error, run_command

if __name__ == "__main__":
    # Before the seconds that it takes to import jax.
    OPTIONS = exit_on_error(parse_options)

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from asa_jax.async_tls.calibration import add_sample, choose_channels, fingerprint_of, save_channels
from asa_jax.async_tls.model_layers import build_model, layers_of, prepared, project
from asa_jax.async_tls.settings import key_shape
from asa_jax.config import ModelConfig
from asa_jax.decoding.progress import show_progress
from asa_jax.errors import DataError
from asa_jax.evaluation.perplexity import choose_windows, text_sources
from asa_jax.interop.restore import restore_model
from asa_jax.training.compilation_cache import use_compilation_cache


def main(options: Options) -> None:
    """Restores the model, measures, and writes the file."""
    use_compilation_cache()
    samples = read_samples(options)
    config, params, step = restore_model(options.workdir, step=options.step)
    cfg, listed = prepared(config.model, params)
    totals = measure(cfg, listed, samples)
    number = options.settings.sizes.num_channels
    channels = [choose_channels(of_layer, number) for of_layer in totals]
    save_channels(options.output, channels, fingerprint_of(config.model, params))
    share = np.mean([_share(*pair) for pair in zip(totals, channels, strict=True)])
    print(
        f"{options.output}: {number} of {totals.shape[-1]} channels, {share:.0%} of the weight "
        f"over {samples.size} tokens ({options.workdir}, step {step})"
    )


def read_samples(options: Options) -> np.ndarray:
    """Token ids int32 [samples, length], evenly spread over the text.

    Raises:
        DataError: the text is shorter than a sample.
    """
    length, number = options.sample_tokens, options.num_samples
    samples = [
        source.parts[window.part].read(window.start, length)
        for source in text_sources(options.text, options.tokenizer)
        for window in choose_windows(source.parts, length, number * length)
        if window.tokens == length + 1
    ]
    if not samples:
        names = ", ".join(map(str, options.text))
        raise DataError(f"{names}: shorter than --sample_tokens={length}; give more text")
    return np.stack(samples)


def measure(cfg: ModelConfig, params: Any, samples: np.ndarray) -> np.ndarray:
    """The weight of each channel: float32 [layers, K, H], sums over the samples."""
    shape = key_shape(cfg)
    totals = jnp.zeros((cfg.num_layers, shape.num_kv_heads, shape.head_dim))
    with show_progress("samples") as progress:
        for number, tokens in enumerate(samples, 1):
            totals = jax.block_until_ready(_add(params, totals, tokens[None], cfg=cfg))
            progress(number, len(samples))
    return np.asarray(totals)


@functools.partial(jax.jit, static_argnames="cfg")
def _add(params: Any, totals: jax.Array, tokens: jax.Array, *, cfg: ModelConfig) -> jax.Array:
    model = build_model(cfg, params)
    x, positions = model.embedding(tokens), jnp.arange(tokens.shape[1])[None]
    added = []
    for layer, so_far in zip(layers_of(model), totals, strict=True):
        projected = project(layer, x, positions)
        added.append(add_sample(so_far, projected.query, projected.key))
        x = layer(x, positions, jnp.ones_like(tokens))
    return jnp.stack(added)


def _share(totals: np.ndarray, channels: np.ndarray) -> float:
    """How much of the weight the channels hold."""
    return float(np.take_along_axis(totals, channels, axis=1).sum() / totals.sum())


if __name__ == "__main__":
    run_command(lambda: main(OPTIONS))
