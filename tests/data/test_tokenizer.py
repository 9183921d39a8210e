"""Tokenizers: round trips, byte lengths, ends of documents, streaming, bad files."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from asa_jax.data import tokenizer as tokenizer_module
from asa_jax.data import train_tokenizer
from asa_jax.data.tokenizer import StreamingDecoder, Tokenizer, load_tokenizer
from asa_jax.errors import ConfigError, DataError

BUNDLED = Path(__file__).parents[2] / "texts" / "tokenizer.json"
TEXTS = [
    "It is a truth universally acknowledged,",
    "Café, naïveté, Åse, ﬁn",
    "你好世界。漢字かな交じり文",
    "🎉👩‍👩‍👧🏽 flags 🇨🇭",
    "\ttabs\r\n\n  and   spaces ",
    "a document that says <|endoftext|> in its middle",
    "",
]


def sentencepiece_like() -> tokenizers.Tokenizer:
    """A BPE with byte fallback and ▁ for spaces, as Llama 2 has it."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "t", "h", "e", "a", "▁t", "he", "▁the"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    model = models.BPE(
        {piece: i for i, piece in enumerate(pieces)}, merges, byte_fallback=True, unk_token="<unk>"
    )
    made = tokenizers.Tokenizer(model)
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["<s>", "</s>"])
    return made


def saved(made: tokenizers.Tokenizer, path: Path) -> Path:
    made.save(str(path))
    return path


@pytest.fixture(params=["bytes", "bundled"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer("bytes" if request.param == "bytes" else BUNDLED)


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_document_id not in ids
    np.testing.assert_array_equal(tokenizer.encode_batch([text, text])[1], ids)


@given(text=st.text())
def test_byte_lengths_of_the_tokens_sum_to_the_text(text: str) -> None:
    for tokenizer in (load_tokenizer("bytes"), BUNDLED_TOKENIZER):
        lengths = tokenizer.byte_lengths()
        assert lengths.shape == (tokenizer.vocab_size,)
        assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


BUNDLED_TOKENIZER = load_tokenizer(BUNDLED)


def test_special_tokens_have_no_bytes_and_no_text(tokenizer: Tokenizer) -> None:
    end = tokenizer.end_of_document_id
    assert tokenizer.byte_lengths()[end] == 0
    assert tokenizer.decode([*tokenizer.encode("ab"), end]) == "ab"


def test_byte_lengths_with_byte_fallback(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved(sentencepiece_like(), tmp_path / "tokenizer.json"))
    assert tokenizer.end_of_document == "</s>"
    ids = tokenizer.encode("the the é")
    # The normalizer puts a space before the text, which decoding takes away again.
    assert tokenizer.byte_lengths()[ids].sum() == len(" the the é".encode())
    assert tokenizer.decode(ids) == "the the é"


@given(text=st.text(min_size=1))
def test_streaming_gives_only_whole_characters(text: str) -> None:
    for tokenizer in (load_tokenizer("bytes"), BUNDLED_TOKENIZER):
        stream = StreamingDecoder(tokenizer)
        parts = [stream.push(token) for token in tokenizer.encode(text)]
        assert "".join(parts) + stream.flush() == text
        assert "�" in text or not any("�" in part for part in parts)


def test_streaming_keeps_spaces_that_decoding_strips(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved(sentencepiece_like(), tmp_path / "tokenizer.json"))
    stream = StreamingDecoder(tokenizer)
    parts = [stream.push(token) for token in tokenizer.encode("the the é the")]
    assert "".join(parts) + stream.flush() == "the the é the"


def test_streaming_does_not_hold_broken_text_for_ever() -> None:
    stream = StreamingDecoder(load_tokenizer("bytes"))
    assert any(stream.push(0xFF) for _ in range(8))


def test_training_is_deterministic_and_ends_documents_with_token_0(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("the cat and the hat and the rat on the mat " * 20)
    for name in ("one.json", "two.json"):
        arguments = ["--input", str(text), "--vocab-size", "270", "--output", str(tmp_path / name)]
        train_tokenizer.main(arguments)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    trained = load_tokenizer(tmp_path / "one.json")
    assert (trained.vocab_size, trained.end_of_document_id) == (270, 0)
    assert len(trained.encode("the cat")) < len("the cat")


def test_training_asks_for_enough_text_and_room(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab")
    arguments = ["--input", str(tmp_path / "a.txt"), "--output", str(tmp_path / "t.json")]
    with pytest.raises(DataError, match="only 258 tokens: add text or lower --vocab-size"):
        train_tokenizer.main([*arguments, "--vocab-size", "300"])
    with pytest.raises(ConfigError, match="--vocab-size 256: must be at least 257"):
        train_tokenizer.main([*arguments, "--vocab-size", "256"])


def test_a_tokenizer_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab")
    arguments = ["--input", str(tmp_path / "a.txt"), "--vocab-size", "258", "--output"]
    for output, reason in ((tmp_path, "Is a directory"), (tmp_path / "a.txt" / "t", "File exists")):
        with pytest.raises(DataError, match=rf"{output}: cannot be written \({reason}\)"):
            train_tokenizer.main([*arguments, str(output)])


def test_unknown_end_of_document_is_asked_for(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    made.add_special_tokens(["<stop>"])
    path = saved(made, tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"--end-of-document \(special tokens: <stop>\)"):
        load_tokenizer(path)
    with pytest.raises(ConfigError, match="has no token '<end>'"):
        load_tokenizer(path, end_of_document="<end>")
    assert load_tokenizer(path, end_of_document="<stop>").end_of_document_id == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"version": "1.0"', "not a tokenizer.json"),
        (b"[]", "not a tokenizer.json"),
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        (json.dumps({"model": {"type": "None"}}).encode(), "not a tokenizer.json"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)


def test_a_missing_or_huge_file_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json: cannot read the tokenizer"):
        load_tokenizer(tmp_path / "nowhere.json")
    monkeypatch.setattr(tokenizer_module, "MAX_TOKENIZER_BYTES", 100)
    with pytest.raises(DataError, match="larger than 100 bytes"):
        load_tokenizer(BUNDLED)


def test_the_bundled_tokenizer_is_trained_on_the_bundled_text(tmp_path: Path) -> None:
    train = BUNDLED.parent / "train" / "*"
    arguments = [
        "--input",
        str(train),
        "--vocab-size",
        "4096",
        "--output",
        str(tmp_path / "t.json"),
    ]
    train_tokenizer.main(arguments)
    assert (tmp_path / "t.json").read_bytes() == BUNDLED.read_bytes()
    held_out = (BUNDLED.parent / "validation" / "northanger_abbey.txt").read_text()
    assert 3.8 < len(held_out) / len(BUNDLED_TOKENIZER.encode(held_out)) < 4.0
