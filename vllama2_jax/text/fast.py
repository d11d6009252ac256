"""Tokenizers run by the `tokenizers` library: any tokenizer.json, and byte-level BPE without it."""

from pathlib import Path

from vllama2_jax.text.tokenizer import Tokenizer, TokenizerError, special_id_table


class FastTokenizer(Tokenizer):
    """`tokenizer.json` as written; a bare vocab.json and merges.txt through transformers."""

    def __init__(self, folder: Path, settings: dict):
        """Read a directory; `settings` are those of `read_settings`."""
        self._backend = backend = _open_backend(folder)
        _add_missing(backend, settings["added"], folder)
        added = backend.get_added_tokens_decoder()
        size = 1 + max(max(backend.get_vocab(with_added_tokens=True).values()), *added, 0)
        bytes_ = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        super().__init__(
            folder,
            vocab_size=size,
            ids=special_id_table(settings, backend.token_to_id),
            special_tokens=settings["special_tokens"],
            chat_template=settings["chat_template"],
            special_ids=frozenset(i for i, token in added.items() if token.special),
            byte_ids=frozenset(i for i in bytes_ if i is not None),
        )

    def encode(self, text: str) -> list[int]:
        """Ids of the text; special tokens in it are recognised, none is added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids, skip_special: bool = True) -> str:
        """The text of ids; bytes that form no character become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)


def _open_backend(folder: Path):
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_file(str(folder / "tokenizer.json"))
    else:
        from transformers import AutoTokenizer

        backend = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        ).backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


def _add_missing(backend, added: dict[int, tuple[str, bool]], folder: Path) -> None:
    """Tokens that only the JSON files beside the vocabulary declare, at the ids they declare."""
    from tokenizers import AddedToken

    for token_id, (text, special) in sorted(added.items()):
        if backend.token_to_id(text) is None:
            token = AddedToken(text, special=special, normalized=False)
            (backend.add_special_tokens if special else backend.add_tokens)([token])
        found = backend.token_to_id(text)
        if found != token_id:
            raise TokenizerError(
                f"{folder}: {text!r} has id {token_id} in tokenizer_config.json but {found} in "
                "the vocabulary; the files belong to different tokenizers"
            )
