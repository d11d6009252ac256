"""Tokenizers against transformers, SentencePiece itself, and ids that transformers 4.40 gave."""

import json
import pickle
import shutil
import subprocess
import sys

import pytest
import sentencepiece

from vllama2_jax.text import TokenizerError, load_tokenizer, tokenizer_files

TEXTS = [
    "<|im_start|>user\nWhat is shown?<|im_end|>\n",
    "a  b\n\n c",
    "naïve café 日本 😀",
    " leading and trailing ",
    "",
    "it's 2024",
]
# Slow and fast LlamaTokenizer of transformers 4.40.0, with this vocabulary.
MISTRAL_IDS = [
    ("<s>[INST] ", [1, 733, 16289, 28793, 28705]),
    ("\nQ [/INST]", [28705, 13, 28824, 733, 28748, 16289, 28793]),
    (" ", [259]),
    (" a", [28705, 264]),
    (
        "A1</s>[INST] Q2 [/INST]A2</s>",
        [330, 28740, 2, 733, 16289, 28793, 1186, 28750]
        + [733, 28748, 16289, 28793, 28741, 28750, 2],
    ),
    ("héllo 日本 😀", [295, 28797, 584, 28709, 28705, 29142, 29119, 28705, 30575]),
    ("a  b\n\n c", [264, 28705, 287, 13, 13, 277]),
    ("<unk>x <s> y</s>\n z", [0, 1318, 28705, 1, 28705, 337, 2, 28705, 13, 686]),
    ("  two  spaces ", [259, 989, 28705, 10599, 28705]),
]
# The same with `"legacy": false` (Vicuna 1.5 has it): no prefix space behind a special token.
MISTRAL_IDS_NOT_LEGACY = [
    ("<s>[INST] ", [1, 28792, 16289, 28793, 28705]),
    ("\nQ [/INST]", [28705, 13, 28824, 733, 28748, 16289, 28793]),
    ("<unk>x <s> y</s>\n z", [0, 28744, 28705, 1, 337, 2, 13, 686]),
]


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_bpe_equals_transformers(qwen2, qwen2_folder, text):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(qwen2_folder)
    ids = theirs.encode(text, add_special_tokens=False)
    assert qwen2.encode(text) == ids
    assert qwen2.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert qwen2.decode(ids, skip_special=False) == text


def test_vocabulary_and_merges_without_tokenizer_json_give_the_same_ids(
    qwen2, qwen2_folder, tmp_path
):
    model = json.loads((qwen2_folder / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    shutil.copy(qwen2_folder / "tokenizer_config.json", tmp_path)
    bare = load_tokenizer(tmp_path)
    assert [bare.encode(text) for text in TEXTS] == [qwen2.encode(text) for text in TEXTS]


@pytest.mark.parametrize("text", TEXTS)
def test_plain_text_equals_sentencepiece_itself(llama, llama_folder, text):
    model = sentencepiece.SentencePieceProcessor(model_file=str(llama_folder / "tokenizer.model"))
    assert llama.encode(text) == model.encode(text)
    assert llama.decode(llama.encode(text)) == text


def test_control_pieces_in_text_are_one_id_and_each_stretch_gets_its_prefix_space(llama):
    assert llama.encode("Yes</s>Yes") == [*llama.encode("Yes"), llama.eos_id, *llama.encode("Yes")]
    assert llama.encode("<s>") == [llama.bos_id]


def test_special_tokens_are_dropped_or_kept_when_decoding(llama, qwen2, chatml_model):
    assert llama.decode(llama.encode("<s>Yes</s>")) == "Yes"
    assert llama.decode(llama.encode("<s>Yes</s>"), skip_special=False) == "<s>Yes</s>"
    for tokenizer in (qwen2, chatml_model):
        ids = tokenizer.encode("Yes\n<|im_end|>\n")
        assert tokenizer.decode(ids) == "Yes\n\n"
        assert tokenizer.decode(ids, skip_special=False) == "Yes\n<|im_end|>\n"


def test_ids_of_begin_end_and_padding(llama, qwen2, chatml_model):
    assert (llama.bos_id, llama.eos_id, llama.pad_id) == (1, 2, 0)
    assert qwen2.bos_id is None
    assert [qwen2.eos_id] == qwen2.encode("<|im_end|>")
    assert [qwen2.pad_id] == qwen2.encode("<|endoftext|>")
    assert chatml_model.bos_id is None
    assert [chatml_model.eos_id] == chatml_model.encode("<|im_end|>")
    assert qwen2.vocab_size == 1 + max(qwen2.special_ids)


@pytest.mark.parametrize("text, ids", MISTRAL_IDS)
def test_mistral_ids_equal_those_of_transformers_4_40(mistral, text, ids):
    assert mistral.encode(text) == ids


@pytest.mark.parametrize("text, ids", MISTRAL_IDS_NOT_LEGACY)
def test_not_legacy_checkpoints_have_no_prefix_space_behind_special_tokens(
    mistral_folder, tmp_path, text, ids
):
    shutil.copy(mistral_folder / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": false}')
    assert load_tokenizer(tmp_path).encode(text) == ids


def test_tokens_added_beside_a_sentencepiece_model_are_recognised(llama, llama_folder, tmp_path):
    shutil.copy(llama_folder / "tokenizer.model", tmp_path)
    size = llama.vocab_size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size}))
    config = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("Yes<|im_end|>") == [*llama.encode("Yes"), size]
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (size, 2, size + 1)


def test_tokenizer_json_is_run_as_written(llama_json):
    """Transformers 5 would rebuild it and lose the first space of " a"."""
    a = llama_json.encode("a")
    assert llama_json.encode(" a") == [*llama_json.encode("\n")[:1], *a]
    assert llama_json.encode("<s>a b</s>") == [1, *a, *llama_json.encode("b"), 2]
    assert llama_json.pad_id == 2


def test_fingerprint_changes_with_any_file(llama, llama_folder, tmp_path):
    shutil.copy(llama_folder / "tokenizer.model", tmp_path)
    (tmp_path / "config.json").write_text("{}")  # not the tokenizer's
    assert load_tokenizer(tmp_path).fingerprint() == llama.fingerprint()
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer(tmp_path).fingerprint() != llama.fingerprint()


def test_tokenizer_files_are_those_that_a_copy_needs(qwen2, qwen2_folder, tmp_path):
    for path in tokenizer_files(qwen2_folder):
        shutil.copy(path, tmp_path)
    copy = load_tokenizer(tmp_path)
    assert copy.fingerprint() == qwen2.fingerprint()
    assert copy.chat_template == qwen2.chat_template


def test_template_comes_from_the_jinja_file_or_the_default_of_a_list(llama_folder, tmp_path):
    shutil.copy(llama_folder / "tokenizer.model", tmp_path)
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert load_tokenizer(tmp_path).chat_template == "y"
    (tmp_path / "chat_template.jinja").write_text("z")
    assert load_tokenizer(tmp_path).chat_template == "z"


def test_tokenizers_travel_to_worker_processes(llama, qwen2):
    for tokenizer in (llama, qwen2):
        assert pickle.loads(pickle.dumps(tokenizer)).encode("a cat") == tokenizer.encode("a cat")


def test_text_room_imports_no_jax_and_no_torch(qwen2_folder, llama_folder):
    code = (
        "import sys; from vllama2_jax.text import load_tokenizer\n"
        f"for f in {[str(qwen2_folder), str(llama_folder)]}: load_tokenizer(f).encode('a')\n"
        "print([m for m in ('jax', 'flax', 'torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _broken(folder, name, content):
    folder.mkdir()
    (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer.json", b"{ not json"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.model", b"no protobuf at all"),
        ("tokenizer.model", b""),
        ("vocab.json", b"{}"),
        ("config.json", b"{}"),
    ],
)
def test_broken_directory_is_one_clear_line(tmp_path, name, content):
    folder = _broken(tmp_path / "broken", name, content)
    with pytest.raises(TokenizerError, match="broken") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_missing_directory_is_one_clear_line(tmp_path):
    with pytest.raises(TokenizerError, match=r"nowhere: no such directory"):
        load_tokenizer(tmp_path / "nowhere")


def test_unreadable_settings_and_foreign_ids_are_named(llama_folder, qwen2_folder, tmp_path):
    shutil.copy(llama_folder / "tokenizer.model", tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text("[1]")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: must hold a JSON object"):
        load_tokenizer(tmp_path)
    wrong = {"added_tokens_decoder": {"7": {"content": "</s>"}}, "eos_token": "</s>"}
    config.write_text(json.dumps(wrong))
    with pytest.raises(TokenizerError, match="different tokenizers"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    shutil.copy(qwen2_folder / "tokenizer.json", tmp_path)
    config.write_text(config.read_text().replace("</s>", "<|im_end|>"))
    with pytest.raises(TokenizerError, match="different tokenizers"):
        load_tokenizer(tmp_path)


def test_vocabulary_without_an_end_is_refused(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="no token ends an answer"):
        load_tokenizer(tmp_path)
