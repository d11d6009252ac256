"""Small tokenizers of both kinds, and the real Mistral vocabulary where its package is present."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from template_sources import QWEN2_TEMPLATE
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from vllama2_jax.text import load_tokenizer

CORPUS = [
    "What is shown in the video? A red ball rolls to the left of a blue box.",
    "You are a helpful assistant. system user assistant",
    "Is there a cat? Yes, there is. No, there is not.\nDescribe the image.",
    "[INST] <<SYS>> Please answer. <</SYS>> [/INST] Q1 Q2 A1 A2",
] * 20
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_sentencepiece(path: Path, **options) -> None:
    """A BPE model with byte fallback, like Llama's, of 400 pieces."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    path.with_suffix(".vocab").unlink()


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    """A directory with nothing but a Llama-like `tokenizer.model`."""
    folder = tmp_path_factory.mktemp("llama")
    train_sentencepiece(folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="session")
def chatml_model_folder(tmp_path_factory) -> Path:
    """A `tokenizer.model` with ChatML's marks as user-defined symbols, without begin and end."""
    folder = tmp_path_factory.mktemp("chatml_model")
    train_sentencepiece(
        folder / "tokenizer.model",
        user_defined_symbols=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "\n"],
        add_dummy_prefix=False,
        bos_id=-1,
        eos_id=-1,
    )
    return folder


@pytest.fixture(scope="session")
def qwen2_folder(tmp_path_factory) -> Path:
    """A byte-level BPE with ChatML's marks, in the files that transformers writes."""
    folder = tmp_path_factory.mktemp("qwen2")
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False),
    )
    marks = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    raw.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    raw.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "chat_template": QWEN2_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(raw.token_to_id(mark)): {"content": mark, "special": True} for mark in marks
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def llama_json_folder(tmp_path_factory) -> Path:
    """A `tokenizer.json` as released Mistral checkpoints have it: prefix space, byte fallback."""
    folder = tmp_path_factory.mktemp("llama_json")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [chr(c) for c in range(33, 127)] + ["▁a", "▁b"]
    raw = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [("▁", "a"), ("▁", "b")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    raw.add_special_tokens(
        [AddedToken(mark, special=True, normalized=False) for mark in pieces[:3]]
    )
    raw.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def mistral_folder(tmp_path_factory) -> Path:
    """The real vocabulary of Mistral 7B and Mixtral 8x7B; skipped without `mistral-common`."""
    spec = importlib.util.find_spec("mistral_common")
    if spec is None:
        pytest.skip("mistral-common is not installed")
    (package,) = spec.submodule_search_locations
    folder = tmp_path_factory.mktemp("mistral")
    shutil.copy(Path(package, "data", "tokenizer.model.v1"), folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="session")
def llama(llama_folder):
    return load_tokenizer(llama_folder)


@pytest.fixture(scope="session")
def llama_json(llama_json_folder):
    return load_tokenizer(llama_json_folder)


@pytest.fixture(scope="session")
def chatml_model(chatml_model_folder):
    return load_tokenizer(chatml_model_folder)


@pytest.fixture(scope="session")
def qwen2(qwen2_folder):
    return load_tokenizer(qwen2_folder)


@pytest.fixture(scope="session")
def mistral(mistral_folder):
    return load_tokenizer(mistral_folder)
