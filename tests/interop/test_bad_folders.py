"""Model folders that cannot be imported: one line that names file and tensor, exit code 2."""

import copy
import dataclasses
import json
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from asa_jax.config import config_from_dict
from asa_jax.data.tokenizer import ByteTokenizer
from asa_jax.errors import ImportedModelError
from asa_jax.interop import convert
from asa_jax.interop.architectures import read_architecture
from asa_jax.interop.export_folder import export_model
from asa_jax.interop.huggingface import load_model
from configs import base
from tests.interop.reference_cases import CASES, TOKENIZER, write_model
from tests.models import random_params, tiny_model_config

NO_TEXT = TOKENIZER | {"model": TOKENIZER["model"] | {"unk_token": "absent"}}
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(UP), f"model.safetensors: tensor {UP} is missing"),
        (lambda t: t.pop("model.norm.weight"), "tensor model.norm.weight is missing"),
        (
            lambda t: t.update({UP: t[UP].T.copy()}),
            f"model.safetensors: tensor {UP}: shape [32, 40] must be [40, 32], by config.json",
        ),
        (
            lambda t: t.update({UP: t[UP].reshape(1, 40, 32)}),
            f"tensor {UP}: shape [1, 40, 32] must be [40, 32]",
        ),
        (
            lambda t: t.update({UP: t[UP].astype(np.int8)}),
            f"tensor {UP}: dtype I8 must be one of F32, F16, BF16",
        ),
        (
            lambda t: t.update({"model.layers.3.mlp.up_proj.weight": t[UP]}),
            "tensor model.layers.3.mlp.up_proj.weight is not part of the model of config.json",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": t["model.norm.weight"]}),
            "tensor model.layers.0.self_attn.q_proj.bias is not part of the model",
        ),
    ],
    ids=["missing", "missing_norm", "transposed", "rank", "dtype", "extra_layer", "extra_bias"],
)
def test_tensors(tmp_path, monkeypatch, change, message):
    path = write_model(tmp_path, CASES["smollm2"]) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    _refuse_arrays(monkeypatch)
    _expect(message, load_model, tmp_path)


def test_truncated_file(tmp_path, monkeypatch):
    path = write_model(tmp_path, CASES["smollm2"]) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    _refuse_arrays(monkeypatch)
    _expect("model.safetensors: tensor ", load_model, tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", None, "model.safetensors: cannot be read (No such file"),
        ("config.json", None, "config.json: cannot be read (No such file"),
        ("config.json", "{", "config.json: broken JSON"),
        ("config.json", "[]", "config.json: must hold a JSON object"),
        ("tokenizer.json", None, "tokenizer.json: cannot read the tokenizer"),
        ("tokenizer.json", "{}", "tokenizer.json: not a tokenizer.json"),
        ("tokenizer.json", json.dumps(NO_TEXT), "tokenizer.json: reads no text"),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token = 3: must be a token"),
        ("tokenizer_config.json", '{"eos_token": "<x>"}', "has no token '<x>'"),
        ("generation_config.json", '{"eos_token_id": 48}', "eos_token_id = 48: must be a token"),
        ("generation_config.json", '{"eos_token_id": [47, "a"]}', "[47, 'a']: must be a token"),
        ("model.safetensors.index.json", "{}", "weight_map must give a file for each tensor"),
    ],
)
def test_files(tmp_path, monkeypatch, file, content, message):
    path = write_model(tmp_path, CASES["smollm2"]) / file
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    _refuse_arrays(monkeypatch)
    _expect(message, load_model, tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("smollm2", {"model_type": "gpt2"}, "model_type = 'gpt2': must be one of"),
        ("smollm2", {"model_type": None}, "model_type = None: must be one of"),
        ("smollm2", {"model_type": 3}, "model_type = 3: must be a string"),
        ("smollm2", {"hidden_size": None}, "hidden_size = None: must be an int"),
        ("smollm2", {"hidden_size": "32"}, "hidden_size = '32': must be an int"),
        ("smollm2", {"hidden_size": True}, "hidden_size = True: must be an int"),
        ("smollm2", {"hidden_size": 2**63}, "hidden_size = 9223372036854775808: must be an int of"),
        ("smollm2", {"hidden_size": -32}, "config.model.hidden_size = -32: must be positive"),
        ("smollm2", {"num_attention_heads": 0}, "config.model.num_heads = 0: must be positive"),
        ("smollm2", {"num_hidden_layers": 0}, "layer_kinds = (): must be at least one layer"),
        ("smollm2", {"num_key_value_heads": 3}, "num_heads = 4: must be a multiple of"),
        ("smollm2", {"rms_norm_eps": "small"}, "rms_norm_eps = 'small': must be a number"),
        ("smollm2", {"tie_word_embeddings": 1}, "tie_word_embeddings = 1: must be true or false"),
        ("smollm2", {"hidden_act": "gelu"}, "hidden_act = 'gelu': must be 'silu'"),
        ("smollm2", {"quantization_config": {}}, "quantised weights are not supported"),
        ("smollm2", {"rope_scaling": 3}, "rope_scaling = 3: must be an object"),
        (
            "smollm2",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling.type = 'linear': must be 'default' or 'llama3' or 'yarn'",
        ),
        (
            "smollm2",
            {"rope_parameters": {"rope_type": "longrope"}},
            "rope_parameters.rope_type = 'longrope': must be",
        ),
        (
            "smollm2",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
            "rope_scaling.high_freq_factor = None: must be a number",
        ),
        (
            "smollm2",
            {"rope_scaling": {"rope_type": "yarn", "factor": 0.5}},
            "rope_scaling.factor = 0.5: must be at least 1",
        ),
        ("smollm2", {"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000: must be from 0"),
        (
            "smollm2",
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "must be one object for all layers",
        ),
        ("smollm2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: must be 1.0"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window = True: must be False"),
        ("deepseek_v2", {"topk_method": "other"}, "topk_method = 'other': must be 'greedy'"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob = True: must be False"),
        ("deepseek_v2", {"num_key_value_heads": 2}, "num_key_value_heads = 2: must be 4"),
        ("deepseek_v3", {"n_group": 3}, "num_experts = 8: must be a multiple of"),
        ("deepseek_v3", {"topk_group": 5}, "num_selected_groups = 5: must be at most"),
        ("deepseek_v3", {"num_experts_per_tok": 5}, "num_experts_per_token = 5: must be at most 4"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq = 2: must be 1"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func = 'softmax': must be 'sigmoid'"),
        (
            "glm4_moe_lite",
            {"mlp_layer_types": ["sparse", "dense", "sparse"]},
            "mlp_layer_types = ['sparse', 'dense', 'sparse']: must be 3 names, 'dense' before",
        ),
    ],
)
def test_config(tmp_path, name, change, message):
    (tmp_path / "config.json").write_text(json.dumps(CASES[name] | change))
    error = _expect(message, read_architecture, tmp_path)
    assert error.startswith(f"{tmp_path}/config.json: ")


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.just(10**400),
    st.lists(st.integers()), st.dictionaries(st.text(), st.integers()),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_value_of_any_field_gives_a_model_or_one_line(data):
    config = copy.deepcopy(CASES[data.draw(st.sampled_from(sorted(CASES)))])
    for place in (config, config.get("rope_scaling")):
        if isinstance(place, dict) and place:
            field = data.draw(st.sampled_from(sorted(place)))
            place |= {field: data.draw(ANYTHING)}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        try:
            cfg, table = read_architecture(Path(folder))
        except ImportedModelError as error:
            assert "\n" not in str(error)
        else:
            assert len(table.layer(cfg.num_layers - 1)) > 4


@pytest.mark.parametrize(
    ("name", "config", "tensor"),
    [
        ("smollm2", {}, "model.layers.1.self_attn.rotary_emb.inv_freq"),
        ("deepseek_v3", {"num_nextn_predict_layers": 1}, "model.layers.3.eh_proj.weight"),
    ],
)
def test_tensors_without_use_are_left_out(tmp_path, name, config, tensor):
    path = write_model(tmp_path, CASES[name] | config) / "model.safetensors"
    save_file(load_file(path) | {tensor: np.zeros(3, np.float32)}, path)
    load_model(tmp_path)


def test_a_tied_embedding_may_be_given_twice_but_not_otherwise(tmp_path, monkeypatch):
    path = write_model(tmp_path, CASES["smollm2"]) / "model.safetensors"
    tensors = load_file(path)
    table = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": table}, path)
    load_model(tmp_path)
    _refuse_arrays(monkeypatch)
    message = "model.safetensors: tensor lm_head.weight: differs from model.embed_tokens.weight"
    for other in (table + 1, table[:, :4].copy(), table.astype(np.float16)):
        save_file(tensors | {"lm_head.weight": other}, path)
        _expect(message, load_model, tmp_path)


def test_many_layers_in_a_config_are_refused_soon(tmp_path, monkeypatch):
    """One of each kind is traced, however many there are said to be."""
    config = config_from_dict(base.get_config().to_dict())
    model = tiny_model_config(("local", "global"), vocab_size=257)
    config, params = dataclasses.replace(config, model=model), random_params(model)
    export_model(config, params, ByteTokenizer(), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    fields = json.loads(path.read_text())
    fields["model"]["layer_kinds"] *= 500
    path.write_text(json.dumps(fields))
    traced, abstract_layer = [], convert.abstract_layer
    monkeypatch.setattr(
        convert, "abstract_layer", lambda *a: traced.append(a) or abstract_layer(*a)
    )
    _expect("tensor model.layers.2.attention.", load_model, tmp_path / "model")
    assert len(traced) == 2


def _refuse_arrays(monkeypatch):
    """All checks come before the first array."""

    def fail(*args):
        raise AssertionError("an array was made")

    monkeypatch.setattr(jax, "make_array_from_callback", fail)


def _expect(message, function, *args):
    with pytest.raises(ImportedModelError) as error:
        function(*args)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2
    return str(error.value)
