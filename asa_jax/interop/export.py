"""Writes a trained run as a model folder: safetensors, config.json, tokenizer.json.

    python -m asa_jax.interop.export --workdir=runs/full --output=models/full

A model whose layers are all `full` becomes one that `transformers` loads, every other one a folder
in the layout of docs/interop.md, which this program loads bit for bit.

Exit codes: 0 done; 1 the checkpoint cannot be used or nothing be written; 2 a flag is wrong.
"""

from asa_jax.flags import exit_on_error, run_command
from asa_jax.interop.export_options import Options, parse_options

if __name__ == "__main__":
    # Before the seconds that it takes to import jax.
    OPTIONS = exit_on_error(parse_options)

from asa_jax.interop.export_folder import export_model
from asa_jax.interop.export_llama import is_llama
from asa_jax.trained_run import load_run_tokenizer
from asa_jax.training.checkpoint import restore_params


def main(options: Options) -> None:
    """Restores the run and writes the folder."""
    config, params, step = restore_params(options.workdir, step=options.step)
    export_model(
        config, params, load_run_tokenizer(options.workdir), options.output,
        dtype=options.dtype, max_file_bytes=options.max_file_bytes, overwrite=options.overwrite,
    )  # fmt: skip
    layout = "for transformers" if is_llama(config.model) else "in the layout asa_jax"
    print(f"{options.workdir}, step {step}: {options.output}, {layout}")


if __name__ == "__main__":
    run_command(lambda: main(OPTIONS))
