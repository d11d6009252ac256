"""Plain SentencePiece models: `tokenizer.model`, with what JSON files beside it may add."""

import re
from pathlib import Path

import sentencepiece

from vllama2_jax.text.tokenizer import Tokenizer, TokenizerError, special_id_table

_IN_BRACKETS = re.compile(r"<[^<>]+>")


class SentencePieceTokenizer(Tokenizer):
    """A `tokenizer.model`; equals the original's slow Llama tokenizer.

    SentencePiece does not parse control pieces in a text, so the text is cut at them and every
    stretch between is encoded by itself, with the model's prefix space (in front of the first
    stretch only where the checkpoint says `"legacy": false`). Control pieces, the unknown piece and
    user-defined pieces in angle brackets are special; other user-defined pieces are plain text.
    """

    def __init__(self, folder: Path, settings: dict):
        """Read a directory; `settings` are those of `read_settings`."""
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        self._model, self._legacy = model, settings["legacy"]
        specials = {model.id_to_piece(i): i for i in range(len(model)) if _is_special(model, i)}
        plain_added = set()
        for token_id, (text, special) in sorted(settings["added"].items()):
            if token_id < len(model) and model.id_to_piece(token_id) != text:
                raise TokenizerError(
                    f"{folder}: {text!r} has id {token_id} in tokenizer_config.json, which is "
                    f"{model.id_to_piece(token_id)!r} in tokenizer.model; the files belong to "
                    "different tokenizers"
                )
            specials[text] = token_id
            if not special:
                plain_added.add(token_id)
        self._split_ids = specials
        self._texts = {token_id: text for text, token_id in specials.items()}
        longest_first = sorted(specials, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        own = {
            "bos_token": model.bos_id(),
            "eos_token": model.eos_id(),
            "unk_token": model.unk_id(),
            "pad_token": model.pad_id(),
        }
        declared = {name: model.id_to_piece(i) for name, i in own.items() if i >= 0}
        settings = {**settings, "special_tokens": declared | settings["special_tokens"]}
        super().__init__(
            folder,
            vocab_size=1 + max(len(model) - 1, *specials.values()),
            ids=special_id_table(settings, self._id_of),
            special_tokens=settings["special_tokens"],
            chat_template=settings["chat_template"],
            special_ids=frozenset(specials.values()) - plain_added,
            byte_ids=frozenset(i for i in range(len(model)) if model.is_byte(i)),
        )

    def encode(self, text: str) -> list[int]:
        """Ids of the text; special tokens in it are recognised, none is added."""
        ids: list[int] = []
        for i, stretch in enumerate(self._split.split(text)):
            if i % 2:
                ids.append(self._split_ids[stretch])
            elif self._legacy or i == 0:
                ids += self._model.encode(stretch)
            else:
                ids += self._encode_without_prefix(stretch)
        return ids

    def decode(self, ids, skip_special: bool = True) -> str:
        """The text of ids; bytes that form no character become U+FFFD."""
        out: list[str] = []
        stretch: list[int] = []
        for token in map(int, ids):
            if token in self.special_ids and skip_special:
                continue
            if token in self._texts:
                out += [self._model.decode(stretch), self._texts[token]]
                stretch = []
            else:
                stretch.append(token)
        out.append(self._model.decode(stretch))
        return "".join(out)

    def _encode_without_prefix(self, text: str) -> list[int]:
        """Ids without the prefix space: it goes in front of a line break, and both are cut away."""
        head = self._model.encode("\n")
        ids = self._model.encode("\n" + text)
        return ids[len(head) :] if ids[: len(head)] == head else self._model.encode(text)

    def _id_of(self, text: str) -> int | None:
        if text in self._split_ids:
            return self._split_ids[text]
        found = self._model.piece_to_id(text)
        return found if self._model.id_to_piece(found) == text else None


def _is_special(model, token_id: int) -> bool:
    """Control, unknown, or a user-defined symbol like `<|im_end|>` (whose score is exactly 0)."""
    if model.is_control(token_id) or model.is_unknown(token_id):
        return True
    if model.is_byte(token_id) or model.is_unused(token_id) or model.get_score(token_id) != 0:
        return False
    return _IN_BRACKETS.fullmatch(model.id_to_piece(token_id)) is not None
