"""Conversations -> prompt text: chat templates, and what the original's inference sends.

Messages are `{"role": "system" | "user" | "assistant", "content": str}`. What was chosen where the
sources leave room: docs/decisions/chat-templates.md.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence

from vllama2_jax.text.prompt import PLACEHOLDERS
from vllama2_jax.text.tokenizer import Tokenizer

Message = dict[str, str]

# The system turn of the original's `mm_infer` for Mistral and Mixtral, tags included: Llama 2's
# default prompt with a second space behind "safe." and no blank line in front of "If".
MISTRAL_SYSTEM = (
    "<<SYS>>\n"
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe.  Your answers should not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content. Please ensure that your responses are socially unbiased "
    "and positive in nature.\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of "
    "answering something not correct. If you don't know the answer to a question, please don't "
    "share false information."
    "\n<</SYS>>"
)
_CHATML_SYSTEM = "You are a helpful assistant."
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

_FAMILY_TEMPLATES = {
    "mistral": "mistral",
    "mixtral": "mistral",
    "qwen2": "chatml",
    "llama": "vicuna",
}


class TemplateError(ValueError):
    """Messages that a chat template cannot render; the message says why."""


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A checkpoint's own Jinja template, rendered in a sandbox that runs no other code.

    Attributes:
      source: the template, with the dialect of transformers' `apply_chat_template`.
      special_tokens: ("bos_token", "<s>")-like pairs that the template may refer to.
    """

    source: str
    special_tokens: tuple[tuple[str, str], ...] = ()

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The prompt text.

        Raises:
          TemplateError: if the template is broken, refuses the messages, or leaves the sandbox.
        """
        try:
            return _compile(self.source).render(
                messages=[dict(m) for m in messages],
                add_generation_prompt=add_generation_prompt,
                **dict(self.special_tokens),
            )
        except Exception as error:  # a template can fail like any program
            reason = " ".join(str(error).split()) or type(error).__name__
            raise TemplateError(
                f"the checkpoint's chat template cannot render these messages: {reason}"
            ) from error


@functools.lru_cache(maxsize=16)
def _compile(source: str):
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals["raise_exception"] = refuse
    # Jinja's own would escape HTML.
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    return environment.from_string(source)


def render(
    messages: Sequence[Message], template: str | ChatTemplate, *, add_generation_prompt: bool
) -> str:
    """The prompt text of a conversation.

    Args:
      messages: at most one system turn, in front; then user and assistant in turn.
      template: "mistral" (Mistral and Mixtral), "chatml" (Qwen2), "llama2", "vicuna", or a
        checkpoint's own.
      add_generation_prompt: end with what invites an answer (nothing for "mistral" and "llama2").

    Raises:
      TemplateError: for an unknown template, or messages in another order.
    """
    if isinstance(template, ChatTemplate):
        return template.render(messages, add_generation_prompt)
    if template not in _TEMPLATES:
        raise TemplateError(f"unknown chat template {template!r}; known: {', '.join(_TEMPLATES)}")
    system, turns = split_system(messages)
    return _TEMPLATES[template](system, turns, add_generation_prompt)


def choose_template(family: str, tokenizer: Tokenizer) -> str | ChatTemplate:
    """The checkpoint's own template if it has one, else the family's.

    A Mistral or Mixtral template that refuses a system turn, as the base models' own do, cannot be
    what the original's inference used, which sends one: then the family's is taken.

    Args:
      family: "mistral", "mixtral", "qwen2" or "llama".
      tokenizer: of the checkpoint.

    Raises:
      TemplateError: for an unknown family.
    """
    if family not in _FAMILY_TEMPLATES:
        raise TemplateError(
            f"no chat template for family {family!r}; known: {', '.join(_FAMILY_TEMPLATES)}"
        )
    named = _FAMILY_TEMPLATES[family]
    if not tokenizer.chat_template:
        return named
    own = ChatTemplate(tokenizer.chat_template, tuple(sorted(tokenizer.special_tokens.items())))
    if named == "mistral":
        try:
            own.render(_with_system([{"role": "user", "content": "?"}]), True)
        except TemplateError:
            return named
    return own


def inference_messages(
    family: str, question: str | Sequence[Message], modality: str
) -> list[Message]:
    """What the original's `mm_infer` sends: the media in front of the first user turn.

    For Mistral and Mixtral its system turn goes in front, unless the conversation brings one. For
    "text" the placeholder is empty but the line break stays, as in the original.

    Args:
      family: "mistral", "mixtral", "qwen2" or "llama".
      question: one question, or a conversation.
      modality: "video", "image", "audio" or "text".

    Raises:
      TemplateError: for an unknown modality, or a conversation without a user turn.
    """
    tag = "" if modality == "text" else f"<{modality}>"
    if tag and tag not in PLACEHOLDERS:
        raise TemplateError(f"unknown modality {modality!r}; known: video, image, audio, text")
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    messages = _checked(messages)
    first = next((message for message in messages if message["role"] == "user"), None)
    if first is None:
        raise TemplateError("a conversation needs a user turn; there is none")
    first["content"] = f"{tag}\n{first['content']}"
    if _FAMILY_TEMPLATES.get(family) == "mistral" and messages[0]["role"] != "system":
        messages = _with_system(messages)
    return messages


def messages_from_llava(conversations: Sequence[dict[str, str]]) -> list[Message]:
    """Messages of LLaVA's `[{"from": "human" | "gpt", "value": str}, ...]`.

    One leading sentence that is not human is dropped, as the original does.

    Raises:
      TemplateError: unless the rest alternates human, gpt and ends with gpt.
    """
    speakers = [sentence.get("from") for sentence in conversations]
    skip = 1 if speakers and speakers[0] != "human" else 0
    if not speakers[skip:] or speakers[skip:] != ["human", "gpt"] * (len(speakers[skip:]) // 2):
        raise TemplateError(f"a conversation must alternate human, gpt; found {speakers}")
    roles = {"human": "user", "gpt": "assistant"}
    return [{"role": roles[s["from"]], "content": s["value"]} for s in conversations[skip:]]


def split_system(messages: Sequence[Message]) -> tuple[str | None, list[Message]]:
    """The system turn's content, if any, and the other turns.

    Raises:
      TemplateError: unless those alternate user, assistant and begin with user.
    """
    messages = _checked(messages)
    system = None
    if messages and messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    roles = [message["role"] for message in messages]
    if not roles or roles != (["user", "assistant"] * len(roles))[: len(roles)]:
        raise TemplateError(
            f"messages must alternate user, assistant behind at most one system turn; found {roles}"
        )
    return system, messages


def _checked(messages: Sequence[Message]) -> list[Message]:
    """Copies of the messages, each with a role and a text."""
    for message in messages:
        if not all(isinstance(message.get(name), str) for name in ("role", "content")):
            raise TemplateError(f"a message needs a role and a text as content; found {message}")
    return [dict(message) for message in messages]


def _with_system(messages: list[Message]) -> list[Message]:
    return [{"role": "system", "content": MISTRAL_SYSTEM}, *messages]


def _mistral(system: str | None, turns: list[Message], cue: bool) -> str:
    """Mistral-Instruct v0.2; a system text stands in front of the first question."""
    text = "<s>"
    for i, turn in enumerate(turns):
        if turn["role"] == "user":
            front = f"{system}\n\n" if system is not None and i == 0 else ""
            text += f"[INST] {front}{turn['content']} [/INST]"
        else:
            text += f"{turn['content']}</s>"
    return text


def _chatml(system: str | None, turns: list[Message], cue: bool) -> str:
    """Qwen2-Instruct."""
    system = _CHATML_SYSTEM if system is None else system
    text = f"<|im_start|>system\n{system}<|im_end|>\n"
    for turn in turns:
        text += f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n"
    return text + ("<|im_start|>assistant\n" if cue else "")


def _llama2(system: str | None, turns: list[Message], cue: bool) -> str:
    """Llama-2-chat; the tags are put around the system text."""
    text = ""
    for i, turn in enumerate(turns):
        content = turn["content"].strip()
        if turn["role"] == "user":
            front = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system is not None and i == 0 else ""
            text += f"<s>[INST] {front}{content} [/INST]"
        else:
            text += f" {content} </s>"
    return text


def _vicuna(system: str | None, turns: list[Message], cue: bool) -> str:
    """Vicuna v1.1 and later."""
    text = f"<s>{_VICUNA_SYSTEM if system is None else system} "
    for turn in turns:
        if turn["role"] == "user":
            text += f"USER: {turn['content']} ASSISTANT:"
        else:
            text += f" {turn['content']}</s>"
    # An answer always follows a question here: the cue is the end of every question.
    return text if cue or turns[-1]["role"] == "assistant" else text.removesuffix(" ASSISTANT:")


_TEMPLATES = {"mistral": _mistral, "chatml": _chatml, "llama2": _llama2, "vicuna": _vicuna}
