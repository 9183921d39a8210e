"""Runs written as model folders, and read again."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from asa_jax.config import Config, MeshConfig, ModelConfig, config_from_dict
from asa_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from asa_jax.errors import CheckpointError, ConfigError, ImportedModelError, UserError
from asa_jax.interop.export_folder import export_model
from asa_jax.interop.export_transformers import transformers_type
from asa_jax.interop.huggingface import load_model
from asa_jax.interop.initial_params import load_initial_params
from asa_jax.interop.restore import restore_model
from asa_jax.model.transformer import abstract_model
from asa_jax.sharding import make_mesh
from asa_jax.trained_run import load_run_tokenizer
from configs import base
from tests.models import random_params, tiny_model_config


def _config(kinds: tuple[str, ...], **fields: Any) -> Config:
    config = config_from_dict(base.get_config().to_dict())
    model = tiny_model_config(kinds, vocab_size=257, **fields)
    return dataclasses.replace(config, model=model)


# Another program's config.json does not hold what its layers do not read.
COMMON_FIELDS = (
    "vocab_size", "hidden_size", "mlp_size", "layer_kinds", "num_heads", "attention_bias",
    "mlp_bias", "rope_theta", "rope_scaling", "norm_epsilon", "tie_embeddings", "init_stddev",
)  # fmt: skip
LLAMA_FIELDS = (*COMMON_FIELDS, "num_kv_heads", "head_dim", "qk_norm")
FIELDS = {
    "llama": LLAMA_FIELDS,
    "qwen3": LLAMA_FIELDS,
    "deepseek_v2": (
        *COMMON_FIELDS, "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
        "v_head_dim", "latent_norm", "latent_norm_epsilon",
    ),
    None: [field.name for field in dataclasses.fields(ModelConfig)],
}  # fmt: skip
YARN = {
    "kind": "yarn", "factor": 8.0, "original_length": 32, "low_frequency_factor": 1.0,
    "high_frequency_factor": 4.0, "beta_fast": 8.0, "beta_slow": 1.0, "truncate": True,
    "attention_factor": 1.2, "score_factor": 1.0,
}  # fmt: skip
CASES = {
    "llama": _config(("full",) * 2, scan_layers=True, rope_theta=5e5, norm_epsilon=1e-5),
    "llama_stretched": _config(
        ("full",) * 3,
        scan_layers=True,
        tie_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        rope_scaling={**YARN, "kind": "llama3", "attention_factor": 1.0, "beta_fast": 32.0},
    ),
    "qwen3": _config(("full",), scan_layers=True, qk_norm=True),
    "asa": _config(("local", "global") * 2, scan_layers=True),
    "asa_without_norm": _config(("local", "global"), latent_norm=False, tie_embeddings=True),
    "mla": _config(("mla",), q_lora_rank=8, scan_layers=True),
    "mla_stretched": _config(
        ("mla",) * 2,
        scan_layers=True,
        attention_bias=True,
        mlp_bias=True,
        tie_embeddings=True,
        rope_theta=5e5,
        norm_epsilon=1e-5,
        rope_scaling=YARN,
    ),
    "mla_without_norm": _config(("mla",), latent_norm=False),
    "nsa": _config(("nsa", "sliding", "full"), nsa_compression="mlp"),
}


def _arrays_equal(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_loads_bit_for_bit(tmp_path, name):
    config, output = CASES[name], tmp_path / "model"
    params = random_params(config.model)
    export_model(config, params, ByteTokenizer(), output, max_file_bytes=20_000)
    assert (output / "model.safetensors.index.json").exists()
    cfg, loaded, _ = load_model(output)
    _arrays_equal(loaded, params)
    for field in FIELDS[transformers_type(config.model)]:
        assert getattr(cfg, field) == getattr(config.model, field), field


@pytest.mark.parametrize("name", [name for name in CASES if transformers_type(CASES[name].model)])
def test_transformers_gives_the_same_logits(tmp_path, name):
    torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
    config, tokens = CASES[name], np.arange(40)[None] * 7 % 257
    params = random_params(config.model)
    export_model(config, params, ByteTokenizer(), tmp_path / "model", max_file_bytes=20_000)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    graphdef = abstract_model(config.model)[0]
    module = nnx.merge(graphdef, jax.tree.map(jnp.asarray, params))
    found = module(tokens, np.arange(40)[None], np.ones_like(tokens)) @ module.unembedding()
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("a rose\n", add_special_tokens=False).input_ids == list(b"a rose\n")


def test_layers_go_out_one_by_one(tmp_path):
    """A stacked model and the same one in a list become the same files."""
    listed, stacked = (_config(("full",) * 2, scan_layers=scan) for scan in (False, True))
    params = random_params(listed.model)
    both = [params["groups"][i]["layers"][0] for i in range(2)]
    groups = {"layers": {0: jax.tree.map(lambda *leaves: np.stack(leaves), *both)}}
    export_model(listed, params, ByteTokenizer(), tmp_path / "a")
    export_model(stacked, {**params, "groups": groups}, ByteTokenizer(), tmp_path / "b")
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in "ab"]
    assert files[0] == files[1]


def test_a_run_can_start_from_a_folder(tmp_path):
    config = CASES["asa"]
    params = random_params(config.model)
    export_model(config, params, ByteTokenizer(), tmp_path / "model")
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1, context=1))
    row = jnp.ones((1, 32), jnp.int32)
    batch = {"inputs": row, "positions": row, "segment_ids": row}
    with jax.set_mesh(mesh):
        found = load_initial_params(tmp_path / "model", config.model, mesh, lambda: batch)
    _arrays_equal(found[0], params)


def test_a_folder_stands_in_for_a_run(tmp_path):
    config, folder = CASES["asa"], tmp_path / "model"
    params = random_params(config.model)
    export_model(config, params, ByteTokenizer(), folder)
    restored, found, step = restore_model(folder)
    assert restored.model == config.model and step == 0
    _arrays_equal(found, params)
    assert load_run_tokenizer(folder).encode("a") == [97]
    with pytest.raises(ConfigError, match=r"--step=3: .* has no steps"):
        restore_model(folder, step=3)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ImportedModelError, match=r"tokenizer.json: cannot read"):
        load_run_tokenizer(folder)
    with pytest.raises(CheckpointError):
        restore_model(tmp_path)


def test_half_precision_is_rounded_once(tmp_path):
    config = CASES["asa"]
    params = random_params(config.model)
    export_model(config, params, ByteTokenizer(), tmp_path / "model", dtype="bfloat16")
    _, loaded, _ = load_model(tmp_path / "model")
    _arrays_equal(loaded, jax.tree.map(lambda x: x.astype("bfloat16"), params))


def test_bytes_become_a_tokenizer_with_the_same_tokens(tmp_path):
    config = CASES["llama"]
    export_model(config, random_params(config.model), ByteTokenizer(), tmp_path / "model")
    written = load_tokenizer(tmp_path / "model" / "tokenizer.json")
    text = "".join(map(chr, [*range(1, 300), 0x4E2D, 0x1F600])) + " a\r\n\t  b"
    assert written.encode(text) == ByteTokenizer().encode(text)
    assert written.decode(written.encode(text)) == text
    np.testing.assert_array_equal(written.byte_lengths(), ByteTokenizer().byte_lengths())
    settings = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == written.end_of_document == "<|endoftext|>"


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    config, output = CASES["mla"], tmp_path / "model"
    params = random_params(config.model)
    export_model(config, params, ByteTokenizer(), output)
    before = (output / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="exists; give another folder, or --overwrite"):
        export_model(config, params, ByteTokenizer(), output)
    monkeypatch.setattr("asa_jax.interop.export_folder.save_file", _full_disk)
    with pytest.raises(Exception, match="cannot be written"):
        export_model(config, params, ByteTokenizer(), output, overwrite=True)
    assert (output / "model.safetensors").read_bytes() == before
    monkeypatch.undo()
    export_model(config, random_params(config.model, 1), ByteTokenizer(), output, overwrite=True)
    assert (output / "model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / "home").mkdir()
    with pytest.raises(ConfigError, match="is no model folder, so it is not overwritten"):
        export_model(config, params, ByteTokenizer(), tmp_path / "home", overwrite=True)


def test_what_is_not_a_model_folder_alone_is_not_overwritten(tmp_path, monkeypatch):
    config, model = CASES["mla"], tmp_path / "model"
    params = random_params(config.model)
    export_model(config, params, ByteTokenizer(), model)
    monkeypatch.chdir(model)
    export_model(config, params, ByteTokenizer(), Path("."), overwrite=True)
    (model / "runs").mkdir()
    with pytest.raises(ConfigError, match="holds other folders, so it is not overwritten"):
        export_model(config, params, ByteTokenizer(), model, overwrite=True)
    (model / "config.json").write_text('{"model": {}}')  # as of a run
    with pytest.raises(ConfigError, match="is no model folder, so it is not overwritten"):
        export_model(config, params, ByteTokenizer(), model, overwrite=True)


def test_values_that_a_dtype_does_not_have_are_refused(tmp_path):
    config = CASES["asa"]
    params = random_params(config.model)
    params["final_norm"]["scale"] *= 1e6
    with pytest.raises(UserError, match=r"final_norm\.scale: has values beyond float16"):
        export_model(config, params, ByteTokenizer(), tmp_path / "model", dtype="float16")
    assert not list(tmp_path.iterdir())


def _full_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version = 2: must be 1"),
        ({"model": None}, "config.model = None: must be a section"),
        ({"model": {"vocab_size": 3}}, "config.model"),
    ],
)
def test_a_broken_native_config_is_one_line(tmp_path, change, message):
    config, output = CASES["asa"], tmp_path / "model"
    export_model(config, random_params(config.model), ByteTokenizer(), output)
    fields = json.loads((output / "config.json").read_text()) | change
    (output / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ImportedModelError) as caught:
        load_model(output)
    assert message in str(caught.value) and "config.json" in str(caught.value)
