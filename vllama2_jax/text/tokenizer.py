"""Tokenizers of checkpoint directories, read from their own files and nothing else.

`tokenizer.json` is run as written by the `tokenizers` library, and `tokenizer.model` by
SentencePiece. Transformers' classes rebuild a Llama tokenizer from its vocabulary by rules of their
own (version 5 loses the space in front of " a"), so only a vocabulary without either file goes
through them (docs/decisions/chat-templates.md).
"""

import abc
import hashlib
import json
from pathlib import Path

# What makes a tokenizer, whichever library wrote it; a checkpoint copies those that exist.
_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
# The end of an answer in vocabularies that do not say which of their tokens it is.
_USUAL_ENDS = ("<|im_end|>", "</s>", "<|endoftext|>")


class TokenizerError(ValueError):
    """A tokenizer directory cannot be used; the message says why and what to do."""


class Tokenizer(abc.ABC):
    """Text <-> ids. Special tokens in the text are recognised, none is ever added.

    Attributes:
      vocab_size: one more than the largest id.
      bos_id: the id that begins a text, or None.
      eos_id: the id that ends an answer.
      pad_id: fills rows; the unknown token where none is declared, like the original does.
      chat_template: Jinja source of the checkpoint's own template, or None.
      special_tokens: names ("bos_token") -> text ("<s>"), what chat templates refer to.
      special_ids: left out by `decode(skip_special=True)`.
      byte_ids: tokens that stand for one raw byte, meaningful only in company.
    """

    def __init__(
        self,
        folder: Path,
        *,
        vocab_size: int,
        ids: dict[str, int | None],
        special_tokens: dict[str, str],
        chat_template: str | None,
        special_ids: frozenset[int],
        byte_ids: frozenset[int],
    ):
        """Keep what the subclasses have read.

        Raises:
          TokenizerError: if no token ends an answer.
        """
        if ids["eos"] is None:
            raise TokenizerError(
                f"{folder}: no token ends an answer; set eos_token in tokenizer_config.json"
            )
        self.folder = folder
        self.vocab_size = vocab_size
        self.bos_id, self.eos_id = ids["bos"], ids["eos"]
        self.pad_id = next(i for i in (ids["pad"], ids["unk"], ids["eos"]) if i is not None)
        self.chat_template = chat_template
        self.special_tokens = special_tokens
        self.special_ids, self.byte_ids = special_ids, byte_ids

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of the text; special tokens in it are recognised, none is added."""

    @abc.abstractmethod
    def decode(self, ids, skip_special: bool = True) -> str:
        """The text of ids; bytes that form no character become U+FFFD."""

    def fingerprint(self) -> str:
        """sha256 (hex) over names and contents of the tokenizer's files."""
        digest = hashlib.sha256()
        for path in tokenizer_files(self.folder):
            content = path.read_bytes()
            digest.update(f"{path.name}\0{len(content)}\0".encode())
            digest.update(content)
        return digest.hexdigest()


def tokenizer_files(folder: str | Path) -> list[Path]:
    """The files of `folder` that make its tokenizer, sorted by name.

    Raises:
      TokenizerError: if there are none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TokenizerError(f"{folder}: no such directory; a tokenizer's directory was expected")
    files = [folder / name for name in _FILES if (folder / name).is_file()]
    if not {path.name for path in files} & {"tokenizer.json", "tokenizer.model", "vocab.json"}:
        raise TokenizerError(
            f"{folder}: holds no tokenizer (tokenizer.json or tokenizer.model); "
            "copy the checkpoint's tokenizer files there"
        )
    return files


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory; local files only, no code of the checkpoint is run.

    Raises:
      TokenizerError: one line that names the directory or file, and what is wrong.
    """
    folder = Path(folder)
    names = {path.name for path in tokenizer_files(folder)}
    settings = read_settings(folder)
    try:
        if "tokenizer.json" not in names and "tokenizer.model" in names:
            from vllama2_jax.text.sentencepiece_model import SentencePieceTokenizer

            return SentencePieceTokenizer(folder, settings)
        from vllama2_jax.text.fast import FastTokenizer

        return FastTokenizer(folder, settings)
    except TokenizerError:
        raise
    except Exception as error:  # the libraries raise bare Exception, RuntimeError, OSError, ...
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise TokenizerError(
            f"{folder}: its tokenizer cannot be read ({reason}); fetch the files again"
        ) from error


def read_settings(folder: Path) -> dict:
    """What the JSON files beside a vocabulary say, in one form.

    Returns:
      {"special_tokens": {"eos_token": text, ...}, "added": {id: (text, is special)},
      "chat_template": source or None, "legacy": whether SentencePiece's prefix space goes in front
      of every stretch between special tokens (transformers' default)}.

    Raises:
      TokenizerError: for a file that is no JSON object.
    """
    config = _read_json(folder / "tokenizer_config.json")
    special = {}
    for source in (_read_json(folder / "special_tokens_map.json"), config):
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            value = source.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                special[name] = value
    added = {}
    for text, token_id in _read_json(folder / "added_tokens.json").items():
        added[int(token_id)] = (text, True)
    for token_id, entry in config.get("added_tokens_decoder", {}).items():
        added[int(token_id)] = (entry["content"], bool(entry.get("special", False)))
    legacy = config.get("legacy")
    return {
        "special_tokens": special,
        "added": added,
        "chat_template": _read_template(folder, config),
        "legacy": True if legacy is None else bool(legacy),
    }


def special_id_table(settings: dict, id_of) -> dict[str, int | None]:
    """{"bos", "eos", "unk", "pad"} -> id or None; `id_of` gives a text's id or None."""
    special = settings["special_tokens"]
    ids = {
        name: id_of(special[f"{name}_token"]) if f"{name}_token" in special else None
        for name in ("bos", "eos", "unk", "pad")
    }
    if ids["eos"] is None:
        ids["eos"] = next((id_of(t) for t in _USUAL_ENDS if id_of(t) is not None), None)
    return ids


def _read_template(folder: Path, config: dict) -> str | None:
    own_file = folder / "chat_template.jinja"
    if own_file.is_file():
        return own_file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name; "default" is the one for conversations
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template or None


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: not readable JSON ({error}); fetch it again") from None
    if not isinstance(data, dict):
        raise TokenizerError(f"{path}: must hold a JSON object; fetch it again")
    return data
