"""GGUF files, written here as llama.cpp's converter does, and read."""

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest

from asa_jax.config import config_from_dict
from asa_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from asa_jax.errors import ConfigError, ImportedModelError
from asa_jax.interop.chat import load_chat_template
from asa_jax.interop.export_folder import export_model
from asa_jax.interop.export_tokenizer import byte_level
from asa_jax.interop.folder_tokenizer import load_folder_tokenizer
from asa_jax.interop.gguf_files import load_gguf
from asa_jax.model.transformer import abstract_model
from configs import base
from tests.models import random_params, tiny_model_config

MODEL = tiny_model_config(
    ("full",) * 2, vocab_size=258, head_dim=8, scan_layers=True, rope_theta=5e4, norm_epsilon=1e-5
)
METADATA: dict[str, Any] = {
    "llama.block_count": 2,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.dimension_count": 8,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.eos_token_id": 256,
    "tokenizer.ggml.merges": ["a b"],
}


def _tensors(params: Any) -> dict[str, np.ndarray]:
    """What the converter makes of a checkpoint."""
    layers = params["groups"]["layers"][0]
    tensors = {
        "token_embd.weight": params["embedding"]["table"],
        "output.weight": params["embedding"]["output"].T,
        "output_norm.weight": params["final_norm"]["scale"],
    }
    for i in range(2):
        layer = jax.tree.map(lambda x, i=i: x[i], layers)
        attention, mlp = layer["attention"], layer["mlp"]
        key, value = attention["key_value"]["weight"]
        rows = {
            "attn_norm": layer["attention_norm"]["scale"],
            "ffn_norm": layer["mlp_norm"]["scale"],
            "attn_q": _in_pairs(attention["query"]["weight"]),
            "attn_k": _in_pairs(key),
            "attn_v": value.reshape(32, -1).T,
            "attn_output": attention["output"]["weight"].reshape(-1, 32).T,
            "ffn_gate": mlp["gate"]["weight"].T,
            "ffn_up": mlp["up"]["weight"].T,
            "ffn_down": mlp["down"]["weight"].T,
        }
        tensors |= {f"blk.{i}.{name}.weight": tensor for name, tensor in rows.items()}
    return tensors


def _in_pairs(weight: np.ndarray) -> np.ndarray:
    """[D, N, H] to rows of which neighbours are rotated together."""
    halves = np.moveaxis(weight, 0, -1).reshape(weight.shape[1], 2, -1, 32)
    return halves.swapaxes(1, 2).reshape(-1, 32)


def _write(path: Path, tensors: dict[str, np.ndarray], **metadata: Any) -> Path:
    """Writes a file; matrices in Q8_0 where asked with quantised=True; None leaves a field out."""
    int8 = metadata.pop("int8", False)
    quantised, arch = metadata.pop("quantised", False), metadata.pop("arch", "llama")
    writer = gguf.GGUFWriter(path, arch)
    spelled = load_tokenizer_tokens()
    writer.add_token_list([*spelled, "<|endoftext|>", "ab"])
    writer.add_token_types([1] * 256 + [3, 1])
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 5e4)
    for name, value in (METADATA | metadata).items():
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        elif value is not None:
            writer.add_uint32(name, value)
    for name, tensor in tensors.items():
        tensor = np.ascontiguousarray(tensor)
        if int8 and name == "output.weight":
            writer.add_tensor(name, tensor.astype(np.int8))
        elif quantised and tensor.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load_tokenizer_tokens() -> list[str]:
    """Each byte as byte-level BPE spells it."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(byte_level())
    return [tokenizer.id_to_token(i) for i in range(256)]


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(MODEL)


def test_parameters_come_back(tmp_path, params):
    cfg, found, tokenizer, template = load_gguf(_write(tmp_path / "a.gguf", _tensors(params)))
    assert cfg.layer_kinds == MODEL.layer_kinds and cfg.rope_theta == 5e4
    assert (cfg.head_dim, cfg.num_kv_heads, cfg.tie_embeddings) == (8, 2, False)
    assert cfg.norm_epsilon == pytest.approx(1e-5)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert jax.tree.structure(found) == jax.tree.structure(abstract_model(cfg)[1])
    assert tokenizer.encode("ab 12é") == [257, *" 12é".encode()]
    assert tokenizer.end_of_document == "<|endoftext|>"
    assert tokenizer.byte_lengths()[[97, 256, 257]].tolist() == [1, 0, 2]
    assert (tokenizer.start_ids, tokenizer.end_ids, template) == ((), (256,), None)


def test_quantised_parameters_are_near(tmp_path, params):
    tensors = _tensors(params)
    del tensors["output.weight"]
    cfg, found, *_ = load_gguf(_write(tmp_path / "a.gguf", tensors, quantised=True))
    assert cfg.tie_embeddings and "output" not in found["embedding"]
    tied = {**params, "embedding": {"table": params["embedding"]["table"]}}

    def near(found: Any, expected: Any) -> None:
        # Q8_0: blocks of 32 values with one scale of 16 bits, to 127 steps.
        np.testing.assert_allclose(found, expected, atol=np.abs(expected).max() / 200)

    jax.tree.map(near, found, tied)
    assert np.any(found["embedding"]["table"] != params["embedding"]["table"])


def test_a_tokenizer_beside_the_file_stands_in(tmp_path, params):
    path = _write(tmp_path / "a.gguf", _tensors(params), **{"tokenizer.ggml.pre": "llama-bpe"})
    with pytest.raises(ImportedModelError, match="'llama-bpe' is not supported; put its"):
        load_gguf(path)
    (tmp_path / "tokenizer.json").write_text(byte_level())
    tokenizer = load_gguf(path).tokenizer
    assert tokenizer.fingerprint == load_tokenizer(tmp_path / "tokenizer.json").fingerprint
    assert tokenizer.end_of_document == ByteTokenizer.end_of_document


def test_a_chat_goes_into_the_model_folder(tmp_path, params):
    metadata = {
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
        "tokenizer.ggml.bos_token_id": 257,
        "tokenizer.ggml.eot_token_id": 10,
        "tokenizer.ggml.add_bos_token": True,
    }
    cfg, found, tokenizer, template = load_gguf(
        _write(tmp_path / "a.gguf", _tensors(params), **metadata)
    )
    config = dataclasses.replace(config_from_dict(base.get_config().to_dict()), model=cfg)
    export_model(config, found, tokenizer, tmp_path / "model", template=template)
    written = load_folder_tokenizer(tmp_path / "model")
    assert written.start_ids == tokenizer.start_ids == (257,)
    assert written.end_ids == tokenizer.end_ids == (256, 10)
    text = load_chat_template(tmp_path / "model").render([{"role": "user", "content": "hi"}])
    assert text == "abhi<|endoftext|>"


REFUSED = [
    ({"tokenizer.ggml.eos_token_id": "a"}, "tokenizer.ggml.eos_token_id = 'a': is no token"),
    ({"tokenizer.ggml.eos_token_id": None}, "tokenizer.ggml.eos_token_id is missing"),
    ({"tokenizer.ggml.eot_token_id": 258}, "tokenizer.ggml.eot_token_id = 258: is no token"),
    ({"tokenizer.ggml.merges": [1]}, "tokenizer.ggml.merges: must be a list of strings"),
    ({"tokenizer.ggml.merges": ["a zz"]}, "tokenizer.ggml.merges: "),
    ({"tokenizer.chat_template": 3}, "tokenizer.chat_template = 3: must be a string"),
    ({"int8": True}, "tensor output.weight: quantisation I8 is not supported"),
    ({"arch": "gemma"}, "general.architecture = 'gemma': must be 'llama'"),
    ({"llama.block_count": None}, "llama.block_count is missing"),
    ({"llama.block_count": 3}, "tensor blk.2.attn_norm.weight is missing"),
    ({"llama.block_count": 1}, "tensor blk.1.attn_k.weight is not part of a Llama model"),
    ({"llama.feed_forward_length": 32}, "blk.0.ffn_gate.weight: shape [64, 32] must be [32, 32]"),
    ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type = 'yarn': must be 'none'"),
    ({"llama.expert_count": 8}, "llama.expert_count = 8: must be 0"),
    ({"tokenizer.ggml.eos_token_id": 999}, "tokenizer.ggml.eos_token_id = 999: is no token"),
    ({"llama.attention.head_count": 0}, "config.model.num_heads = 0"),
]


@pytest.mark.parametrize(("metadata", "reason"), REFUSED)
def test_what_is_not_supported_is_one_line(tmp_path, params, metadata, reason):
    path = _write(tmp_path / "a.gguf", _tensors(params), **metadata)
    with pytest.raises(ImportedModelError) as caught:
        load_gguf(path)
    assert str(caught.value).startswith(f"{path}: ") and reason in str(caught.value)


@pytest.mark.parametrize("size", [0, 3, 100, 5000, -1])
def test_a_truncated_file_is_one_line(tmp_path, params, size):
    path = _write(tmp_path / "a.gguf", _tensors(params))
    path.write_bytes(path.read_bytes()[: -2000 if size < 0 else size])
    with pytest.raises(ImportedModelError, match="is no intact GGUF file"):
        load_gguf(path)
    with pytest.raises(ImportedModelError, match="cannot be read"):
        load_gguf(tmp_path / "absent.gguf")


def test_without_the_package_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install -e '.\[gguf\]'"):
        load_gguf(tmp_path / "a.gguf")
