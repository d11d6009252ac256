"""Toybox's tokenizer: the same file every time, and any text."""

from vllama2_jax.data.toybox.tokenizer import VOCAB_SIZE, train_tokenizer
from vllama2_jax.models.zoo import ZOO
from vllama2_jax.text import load_tokenizer


def test_tokenizer_is_reproducible_and_types_anything(tiny_tokenizer, tmp_path):
    train_tokenizer(tmp_path / "tokenizer.model")
    assert (tmp_path / "tokenizer.model").read_bytes() == (
        tiny_tokenizer.folder / "tokenizer.model"
    ).read_bytes()
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == VOCAB_SIZE == ZOO["tiny"].decoder.vocab_size
    for text in ("Which came first, the red circle?", "  Où est 猫?\n\n", "\ttab", "<video>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("What colour is the shape?")) == 6
    (end,) = tokenizer.encode("<|im_end|>")
    assert tokenizer.eos_id == end and end in tokenizer.special_ids
