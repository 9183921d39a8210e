"""Writes a model folder, of a trained run or of a GGUF file.

    python -m asa_jax.interop.export --workdir=runs/full --output=models/full
    python -m asa_jax.interop.export --gguf=model.gguf --output=models/model

A model whose layers are all `full`, or all `mla`, becomes one that `transformers` loads, every
other one a folder in the layout of docs/interop.md, which this program loads bit for bit.

Exit codes: 0 done; 1 the checkpoint cannot be used or nothing be written; 2 a flag is wrong.
"""

from asa_jax.flags import exit_on_error, run_command
from asa_jax.interop.export_options import Options, parse_options

if __name__ == "__main__":
    # Before the seconds that it takes to import jax.
    OPTIONS = exit_on_error(parse_options)

import dataclasses
from typing import Any

from asa_jax.config import Config, config_from_dict
from asa_jax.data.tokenizer import Tokenizer
from asa_jax.interop.chat import ChatTemplate, find_chat_template
from asa_jax.interop.export_folder import export_model
from asa_jax.interop.export_native import MODEL_TYPE
from asa_jax.interop.export_transformers import transformers_type
from asa_jax.interop.gguf_files import load_gguf
from asa_jax.trained_run import load_run_tokenizer
from asa_jax.training.checkpoint import restore_params
from configs import base


def main(options: Options) -> None:
    """Loads the model and writes the folder."""
    source, config, params, tokenizer, template = load(options)
    export_model(
        config, params, tokenizer, options.output, template=template,
        dtype=options.dtype, max_file_bytes=options.max_file_bytes, overwrite=options.overwrite,
    )  # fmt: skip
    layout = transformers_type(config.model) or MODEL_TYPE
    print(f"{source}: {options.output}, in the layout {layout}")


def load(options: Options) -> tuple[str, Config, Any, Tokenizer, ChatTemplate | None]:
    """What the model is called, its configuration, parameters, tokenizer and chat template."""
    if options.workdir is not None:
        config, params, step = restore_params(options.workdir, step=options.step)
        tokenizer = load_run_tokenizer(options.workdir)
        template = find_chat_template(options.workdir)
        return f"{options.workdir}, step {step}", config, params, tokenizer, template
    assert options.gguf is not None
    cfg, params, tokenizer, template = load_gguf(options.gguf)
    config = dataclasses.replace(config_from_dict(base.get_config().to_dict()), model=cfg)
    return str(options.gguf), config, params, tokenizer, template


if __name__ == "__main__":
    run_command(lambda: main(OPTIONS))
