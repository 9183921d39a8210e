import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import generate
from asa_jax.decoding.generate import Generator
from asa_jax.decoding.options import Options
from asa_jax.decoding.settings import Sampling
from asa_jax.flags import PROJECT
from asa_jax.interop.architectures import read_architecture
from asa_jax.interop.folder_tokenizer import load_folder_tokenizer
from asa_jax.interop.huggingface import load_model
from asa_jax.interop.tensor_table import all_places
from asa_jax.model.param_layout import layer_places
from asa_jax.model.transformer import abstract_model
from asa_jax.trained_run import read_run_config
from tests.interop.reference_cases import (
    CASES,
    NUM_GREEDY_TOKENS,
    PROMPT,
    REFERENCE,
    TOKENIZER,
    write_model,
)
from tests.models import QUICK_COMPILE
from tests.simulated_devices import run_on_eight_devices


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(tmp_path, name):
    cfg, params, _ = load_model(write_model(tmp_path, CASES[name]))
    tokens, logits = _reference(name)
    found = _logits(cfg, params, tokens)
    np.testing.assert_allclose(found, logits, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(found[len(PROMPT) - 1 : -1].argmax(-1), tokens[len(PROMPT) :])


def test_greedy_tokens_equal_those_of_transformers(tmp_path):
    _, params, tokenizer = load_model(write_model(tmp_path, CASES["deepseek_v3"]))
    generator = Generator(read_run_config(tmp_path), params, tokenizer, chunk_tokens=16)
    drawn = generator.stream_tokens(
        [PROMPT.tolist()], max_tokens=NUM_GREEDY_TOKENS, sampling=Sampling(temperature=0)
    )
    tokens, _ = _reference("deepseek_v3")
    np.testing.assert_array_equal(np.concatenate(list(drawn), axis=1)[0], tokens[len(PROMPT) :])


def test_generate_command_gives_the_text_of_transformers(tmp_path, capsys):
    model, words = write_model(tmp_path, CASES["llama3"]), [f"w{i}" for i in PROMPT]
    unset = {name: None for name in Options._fields}
    given = {
        "workdir": model, "tokenizer": load_folder_tokenizer(model), "prompt": " ".join(words),
        "max_tokens": NUM_GREEDY_TOKENS, "sampling": Sampling(temperature=0), "seed": 0,
        "stop": (), "chunk_tokens": 64,
    }  # fmt: skip
    generate.main(Options(**unset | given))
    output, errors = capsys.readouterr()
    tokens, _ = _reference("llama3")
    assert output.split() == [f"w{i}" for i in tokens[len(PROMPT) :]]
    assert errors.startswith(f"{model}, step 0\nattention: ")


def test_command_refuses_a_folder_before_jax_is_imported(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    parse = "import sys; from asa_jax.flags import exit_on_error; "
    parse += "from asa_jax.decoding.options import parse_options; "
    parse += "sys.modules['jax'] = None; exit_on_error(parse_options)"
    done = subprocess.run(
        [sys.executable, "-c", parse, f"--workdir={tmp_path}", "--prompt=a"],
        cwd=PROJECT, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path}/config.json: model_type = 'gpt2': must be")
    assert done.stderr.count("\n") == 1


def test_logits_of_a_mesh():
    tokens, logits = _reference("deepseek_v3")
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), CASES["deepseek_v3"])
        found = run_on_eight_devices(
            Path(__file__).with_name("sharded_logits.py"),
            {"folder": folder, "tokens": tokens.tolist()},
        )
    np.testing.assert_allclose(found, np.stack([logits] * 2), atol=1e-4, rtol=0)


def test_layers_that_are_not_stacked(tmp_path):
    write_model(tmp_path, CASES["glm4_moe_lite"])
    cfg, params, _ = load_model(tmp_path)
    assert params["prefix"]["layers"][0]["mlp"]["up"]["weight"].shape == (32, 40)
    assert params["groups"]["layers"][0]["mlp"]["up"].shape == (2, 8, 32, 12)
    tokens, logits = _reference("glm4_moe_lite")
    listed = dataclasses.replace(cfg, scan_layers=False)
    params["groups"] = {i: jax.tree.map(lambda x, i=i: x[i], params["groups"]) for i in range(2)}
    np.testing.assert_allclose(_logits(listed, params, tokens), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_tensors_come_back_from_parameters(tmp_path, name):
    write_model(tmp_path, CASES[name])
    cfg, table = read_architecture(tmp_path)
    _, params, _ = load_model(tmp_path)
    flat = nnx.traversals.flatten_mapping(jax.tree.map(np.asarray, params))
    expected = load_file(tmp_path / "model.safetensors")
    found = {key: np.full_like(tensor, np.nan) for key, tensor in expected.items()}
    for place in all_places(table, layer_places(cfg)):
        place.row.write(found[place.tensor], flat[place.path][place.stacked], table.sizes)
    for key, tensor in expected.items():
        np.testing.assert_array_equal(found[key], tensor, key)


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        ("bfloat16", None, "bfloat16"),
        ("float16", None, "float16"),
        ("bfloat16", "float32", "float32"),
    ],
)
def test_dtypes(tmp_path, stored, asked, expected):
    write_model(tmp_path, CASES["smollm2"] | {"dtype": stored}, jnp.dtype(stored))
    cfg, params, _ = load_model(tmp_path, param_dtype=asked)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {expected}
    assert cfg.compute_dtype == "bfloat16"
    tensors = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(
        params["groups"]["layers"][0]["mlp"]["up"]["weight"][1],
        tensors["model.layers.1.mlp.up_proj.weight"].T.astype(expected),
    )


def test_parameters_of_several_files_and_dtypes(tmp_path):
    write_model(tmp_path, CASES["qwen3"])
    _, expected, _ = load_model(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    norm = "model.layers.2.input_layernorm.weight"
    tensors[norm] = tensors[norm].astype(ml_dtypes.bfloat16)
    expected["groups"]["layers"][0]["attention_norm"]["scale"] = np.stack(
        [tensors[f"model.layers.{i}.input_layernorm.weight"].astype(np.float32) for i in range(3)]
    )
    places = {name: f"{i % 3}.safetensors" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({n: t for n, t in tensors.items() if places[n] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    _, found, _ = load_model(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_tokenizer_is_that_of_the_folder(tmp_path):
    write_model(tmp_path, CASES["smollm2"])
    _, _, tokenizer = load_model(tmp_path)
    assert tokenizer.encode("w3 w45") == [3, 45]
    assert tokenizer.end_of_document == "</s>"
    assert tokenizer.start_ids == ()
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "w7"}}')
    _, _, tokenizer = load_model(tmp_path)
    assert tokenizer.end_of_document_id == 7


def test_any_of_several_tokens_ends_a_text(tmp_path):
    config = CASES["smollm2"] | {"eos_token_id": [47, 3]}
    _, _, tokenizer = load_model(write_model(tmp_path, config))
    assert tokenizer.end_ids == (47, 3)
    # What a model is tuned to end with goes before what config.json has of its pretraining.
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 47, 5]}')
    _, params, tokenizer = load_model(tmp_path)
    assert tokenizer.end_ids == (47, 9, 5)

    generator = Generator(read_run_config(tmp_path), params, tokenizer)
    greedy = {"max_tokens": NUM_GREEDY_TOKENS, "sampling": Sampling(temperature=0)}
    (drawn,) = np.concatenate(list(generator.stream_tokens([[3]], **greedy)), axis=1).tolist()
    later = next(token for token in drawn if token != drawn[0])
    tokenizer.end_ids = (46, later)
    (completion,) = generator.complete(["w3"], **greedy)
    assert completion.tokens == drawn[: drawn.index(later) + 1]
    assert completion.finish_reason == "end"


def test_prompts_begin_as_the_tokenizer_says(tmp_path):
    write_model(tmp_path, CASES["smollm2"])
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "w9", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "</s>", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "w9": {"id": "w9", "ids": [9], "tokens": ["w9"]},
            "</s>": {"id": "</s>", "ids": [47], "tokens": ["</s>"]},
        },
    }  # fmt: skip
    tokenizer = json.dumps(TOKENIZER | {"post_processor": template})
    (tmp_path / "tokenizer.json").write_text(tokenizer)
    _, params, tokenizer = load_model(tmp_path)
    assert tokenizer.start_ids == (9,)
    assert tokenizer.encode("w3") == [3]
    generator = Generator(read_run_config(tmp_path), params, tokenizer)
    assert generator.encode_prompt("w3") == [9, 3]
    assert generator.encode_prompt("w3", continues=True) == [3]


def _reference(name):
    with np.load(REFERENCE) as arrays:
        return arrays[f"{name}/tokens"], arrays[f"{name}/logits"]


def _logits(cfg, params, tokens):
    def forward(params, tokens):
        model = nnx.merge(abstract_model(cfg)[0], params)
        positions = jnp.arange(tokens.shape[1])[None]
        return model(tokens, positions, jnp.ones_like(tokens)) @ model.unembedding()

    forward = jax.jit(forward, compiler_options=QUICK_COMPILE)
    return np.asarray(forward(params, tokens[None]))[0]
