"""Chat templates against literal prompts and transformers' `apply_chat_template`."""

import hashlib
import json
import shutil

import pytest
from template_sources import MISTRAL_TEMPLATE, QWEN2_TEMPLATE

from vllama2_jax.text import (
    ChatTemplate,
    TemplateError,
    choose_template,
    inference_messages,
    load_tokenizer,
    messages_from_llava,
    render,
)
from vllama2_jax.text.chat import MISTRAL_SYSTEM


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


ONE = [user("<video>\nQ")]
TWO = [user("<video>\nQ1"), assistant("A1"), user("Q2"), assistant("A2")]


def test_mistral_prompts():
    assert render(ONE, "mistral", add_generation_prompt=True) == "<s>[INST] <video>\nQ [/INST]"
    assert (
        render(TWO, "mistral", add_generation_prompt=False)
        == "<s>[INST] <video>\nQ1 [/INST]A1</s>[INST] Q2 [/INST]A2</s>"
    )
    assert (
        render([system("S"), *ONE], "mistral", add_generation_prompt=True)
        == "<s>[INST] S\n\n<video>\nQ [/INST]"
    )


def test_chatml_prompts():
    head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<video>\n"
    cue = "<|im_end|>\n<|im_start|>assistant\n"
    assert render(ONE, "chatml", add_generation_prompt=True) == head + "Q" + cue
    assert (
        render(TWO, "chatml", add_generation_prompt=False)
        == f"{head}Q1{cue}A1<|im_end|>\n<|im_start|>user\nQ2{cue}A2<|im_end|>\n"
    )
    own = render([system("S"), user("Q")], "chatml", add_generation_prompt=False)
    assert own == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"


def test_llama2_prompts():
    assert (
        render([system("S"), *TWO, user("Q3")], "llama2", add_generation_prompt=True)
        == "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\n<video>\nQ1 [/INST] A1 </s>"
        "<s>[INST] Q2 [/INST] A2 </s><s>[INST] Q3 [/INST]"
    )


def test_vicuna_prompts():
    assert render([system("S"), *TWO, user("Q3")], "vicuna", add_generation_prompt=True) == (
        "<s>S USER: <video>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>USER: Q3 ASSISTANT:"
    )
    default = render([user("Q")], "vicuna", add_generation_prompt=False)
    assert default.startswith("<s>A chat between a curious user and an artificial intelligence")
    assert default.endswith("polite answers to the user's questions. USER: Q")


def test_mistral_system_turn_is_the_one_the_original_sends():
    digest = "49223af9a1617ae999463de0b211dbe51de0570d32f6dfa307e69b6ddfeb8c97"
    assert len(MISTRAL_SYSTEM) == 524
    assert hashlib.sha256(MISTRAL_SYSTEM.encode()).hexdigest() == digest


@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_mistral_inference_brings_a_system_turn(family):
    messages = inference_messages(family, "Q", "video")
    assert messages == [system(MISTRAL_SYSTEM), user("<video>\nQ")]
    text = render(messages, "mistral", add_generation_prompt=True)
    assert text.startswith("<s>[INST] <<SYS>>\nYou are")
    assert text.endswith("false information.\n<</SYS>>\n\n<video>\nQ [/INST]")


def test_other_families_send_the_media_and_nothing_more():
    assert inference_messages("qwen2", "Q", "video") == [user("<video>\nQ")]
    assert inference_messages("qwen2", "Q", "image") == [user("<image>\nQ")]
    assert inference_messages("qwen2", "Q", "audio") == [user("<audio>\nQ")]
    assert inference_messages("llama", "Q", "video") == [user("<video>\nQ")]


def test_text_modality_keeps_the_line_break():
    assert inference_messages("qwen2", "Q", "text") == [user("\nQ")]


def test_only_the_first_user_turn_of_a_conversation_gets_the_media():
    asked = [user("Q1"), assistant("A1"), user("Q2")]
    sent = inference_messages("qwen2", asked, "video")
    assert sent == [user("<video>\nQ1"), assistant("A1"), user("Q2")]
    assert asked[0] == user("Q1")
    own = inference_messages("mistral", [system("S"), user("Q")], "video")
    assert own == [system("S"), user("<video>\nQ")]


def test_unknown_names_and_orders_are_refused():
    with pytest.raises(TemplateError, match="known: mistral, chatml, llama2, vicuna"):
        render(ONE, "alpaca", add_generation_prompt=True)
    with pytest.raises(TemplateError, match=r"found \['assistant'\]"):
        render([assistant("A")], "chatml", add_generation_prompt=True)
    with pytest.raises(TemplateError, match="alternate"):
        render([*ONE, *ONE], "mistral", add_generation_prompt=True)
    with pytest.raises(TemplateError, match="alternate"):
        render([], "mistral", add_generation_prompt=True)
    with pytest.raises(TemplateError, match="role and a text"):
        render([{"role": "user", "content": None}], "mistral", add_generation_prompt=True)
    with pytest.raises(TemplateError, match="unknown modality 'smell'"):
        inference_messages("qwen2", "Q", "smell")
    with pytest.raises(TemplateError, match="user turn"):
        inference_messages("qwen2", [assistant("A")], "video")


def _with_template(folder, source, target):
    shutil.copy(folder / "tokenizer.model", target)
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": source}
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(target)


def test_checkpoint_template_is_preferred(qwen2, llama):
    assert choose_template("qwen2", qwen2) == ChatTemplate(
        QWEN2_TEMPLATE, (("eos_token", "<|im_end|>"), ("pad_token", "<|endoftext|>"))
    )
    names = [choose_template(f, llama) for f in ("mistral", "mixtral", "qwen2", "llama")]
    assert names == ["mistral", "mistral", "chatml", "vicuna"]
    with pytest.raises(TemplateError, match="no chat template for family 'gpt'"):
        choose_template("gpt", llama)


def test_mistral_template_without_system_turns_gives_way_to_the_familys(llama_folder, tmp_path):
    tokenizer = _with_template(llama_folder, MISTRAL_TEMPLATE, tmp_path)
    assert choose_template("mistral", tokenizer) == "mistral"
    own = choose_template("llama", tokenizer)
    with pytest.raises(TemplateError, match="Only user and assistant roles are supported!"):
        own.render([system("S"), *ONE], True)
    # Without a system turn both say the same.
    assert own.render(TWO, False) == render(TWO, "mistral", add_generation_prompt=False)


@pytest.mark.parametrize("messages", [ONE, TWO, [system("S"), *TWO, user("Q3 é <b>")]])
@pytest.mark.parametrize("cue", [True, False])
def test_checkpoint_template_equals_transformers(qwen2, qwen2_folder, messages, cue):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(qwen2_folder).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=cue
    )
    own = choose_template("qwen2", qwen2)
    assert render(messages, own, add_generation_prompt=cue) == theirs
    assert render(messages, "chatml", add_generation_prompt=cue) == theirs


def test_dialect_of_transformers_is_understood(qwen2_folder):
    from transformers import AutoTokenizer

    source = """{%- for message in messages %}
    {%- if loop.index > 2 %}{% break %}{% endif %}
    {{- message | tojson }}
    {% if eos_token %}
end {{ eos_token }}
    {% endif %}
{%- endfor %}"""
    messages = [user('<é> "q"'), assistant("A"), user("Q2")]
    theirs = AutoTokenizer.from_pretrained(qwen2_folder).apply_chat_template(
        messages, chat_template=source, tokenize=False
    )
    own = ChatTemplate(source, (("eos_token", "<|im_end|>"),))
    assert own.render(messages, False) == theirs


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ (messages | map(attribute='__class__') | list)[0].__base__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
        "{{ messages.append(1) }}",
        "{% set _ = messages[0].update({'content': 'x'}) %}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ messages[0].content | attr('format') | attr('__func__') }}{{ no_such() }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% if %}",
    ],
)
def test_hostile_or_broken_template_is_refused_in_one_line(source):
    messages = [user("Q")]
    with pytest.raises(TemplateError, match="chat template cannot render") as caught:
        ChatTemplate(source).render(messages, True)
    assert "\n" not in str(caught.value)
    assert messages == [user("Q")]


def test_llava_conversations_become_messages():
    human, gpt = {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}
    assert messages_from_llava([human, gpt]) == [user("Q"), assistant("A")]
    assert messages_from_llava([gpt, human, gpt]) == [user("Q"), assistant("A")]
    for wrong in ([human], [human, human], [gpt, gpt, human], [human, gpt, human], [gpt], []):
        with pytest.raises(TemplateError, match="alternate human, gpt"):
            messages_from_llava(wrong)
