"""Text of ids that arrive one by one."""

from vllama2_jax.text.tokenizer import Tokenizer

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class StreamDecoder:
    """Turns ids into text as they come, never half a character.

    The pieces joined are `tokenizer.decode(ids)`. Only the ids since the last but one cut are
    decoded again, so a long answer costs no more per token than a short one. The earlier cut gives
    the context in which a tokenizer drops or keeps a leading space.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._sent = 0  # ids at the front of the window whose text is out

    def push(self, token: int) -> str:
        """The text that `token` completes, or "" if it ends inside a character."""
        tokenizer = self._tokenizer
        token = int(token)
        if token in tokenizer.special_ids:
            return ""
        self._window.append(token)
        # A run of byte tokens is decoded as one: until it ends, a later byte may still spoil it.
        if token in tokenizer.byte_ids or tokenizer.decode(self._window).endswith(_BROKEN):
            return ""
        return self.flush()

    def flush(self) -> str:
        """The text still held back; call it at the end."""
        before = self._tokenizer.decode(self._window[: self._sent])
        text = self._tokenizer.decode(self._window)[len(before) :]
        if text:
            self._window = self._window[self._sent :]
            self._sent = len(self._window)
        return text
