"""Words -> ids: tokenizers, chat templates, placeholders of media, supervised targets. No JAX."""

from vllama2_jax.text.chat import (
    ChatTemplate,
    TemplateError,
    choose_template,
    inference_messages,
    messages_from_llava,
    render,
)
from vllama2_jax.text.prompt import AUDIO, IMAGE, PLACEHOLDERS, VIDEO, Spliced, expand, tokenize
from vllama2_jax.text.stream import StreamDecoder
from vllama2_jax.text.targets import (
    Example,
    Supervised,
    audio_plain_example,
    place_media_tag,
    plain_example,
    sft_example,
    supervise,
    truncate,
)
from vllama2_jax.text.tokenizer import Tokenizer, TokenizerError, load_tokenizer, tokenizer_files

__all__ = [
    "AUDIO",
    "IMAGE",
    "PLACEHOLDERS",
    "VIDEO",
    "ChatTemplate",
    "Example",
    "Spliced",
    "StreamDecoder",
    "Supervised",
    "TemplateError",
    "Tokenizer",
    "TokenizerError",
    "audio_plain_example",
    "choose_template",
    "expand",
    "inference_messages",
    "load_tokenizer",
    "messages_from_llava",
    "place_media_tag",
    "plain_example",
    "render",
    "sft_example",
    "supervise",
    "tokenize",
    "tokenizer_files",
    "truncate",
]
