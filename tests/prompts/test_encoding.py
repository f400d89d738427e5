"""From rows to text: instruction, system prompt, chat template."""

from __future__ import annotations

import pytest

from rlsys.config.models import PromptsConfig
from rlsys.errors import ConfigError, DataError
from rlsys.models.tiny import build_tokenizer
from rlsys.prompts import RawPrompt
from rlsys.prompts.encoding import Encoder

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = (
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
)


def encoder(template: str | None = None, max_tokens: int = 200, **settings) -> Encoder:
    tokenizer = build_tokenizer(256)
    tokenizer.chat_template = template
    return Encoder(PromptsConfig.model_validate({"train": {"kind": "sums"}, **settings}), tokenizer, max_tokens)


def text(content, template=None, **settings) -> str:
    encoded = encoder(template, **settings).encode(RawPrompt(content, None), "row 0")
    assert len(encoded.token_ids) == len(encoded.text)  # the tokenizer's tokens are characters
    return encoded.text


@pytest.mark.parametrize(
    ("content", "template", "settings", "expected"),
    [
        ("1+2=", None, {}, "1+2="),
        ("1+2=", TEMPLATE, {"chat_template": "never"}, "1+2="),
        ("1+2=", None, {"instruction": "Add."}, "1+2=\nAdd."),
        ("1+2=", TEMPLATE, {}, "<user>1+2=</><assistant>"),
        ("1+2=", TEMPLATE, {"chat_template": "always", "instruction": "Add."}, "<user>1+2=\nAdd.</><assistant>"),
        ("1+2=", TEMPLATE, {"system_prompt": "Be brief."}, "<system>Be brief.</><user>1+2=</><assistant>"),
        (CHAT, TEMPLATE, {}, "<user>one</><assistant>two</><user>three</><assistant>"),
        (CHAT, TEMPLATE, {"instruction": "!"}, "<user>one</><assistant>two</><user>three\n!</><assistant>"),
        (
            ({"role": "system", "content": "mine"}, {"role": "user", "content": "one"}),
            TEMPLATE,
            {"system_prompt": "Be brief."},
            "<system>mine</><user>one</><assistant>",
        ),
    ],
)
def test_text(content, template, settings, expected):
    assert text(content, template, **settings) == expected


def test_the_template_writes_the_special_tokens_itself():
    tokenizer = build_tokenizer(256)
    tokenizer.add_special_tokens({"bos_token": "<eos>"})
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    config = PromptsConfig.model_validate({"train": {"kind": "sums"}})
    plain = Encoder(config, tokenizer, 100).encode(RawPrompt("ab", None), "row 0")
    assert plain.token_ids.tolist() == [1, *tokenizer.convert_tokens_to_ids(["a", "b"])]
    tokenizer.chat_template = "{{ '<eos>' }}{{ messages[0]['content'] }}"
    templated = Encoder(config, tokenizer, 100).encode(RawPrompt("ab", None), "row 0")
    assert templated.token_ids.tolist() == plain.token_ids.tolist()


@pytest.mark.parametrize(
    ("content", "template", "message"),
    [
        (CHAT, None, "row 0: chat messages need a chat template"),
        (CHAT[:2], TEMPLATE, "row 0: the last message is of role 'assistant'"),
        (" \n", None, "row 0: the prompt is empty"),
        ("x" * 201, None, "row 0: the prompt has 201 tokens, .* leaves 200"),
    ],
)
def test_prompts_that_cannot_be_used(content, template, message):
    for method in (encoder(template).encode, encoder(template).check):
        with pytest.raises(DataError, match=message):
            method(RawPrompt(content, None), "row 0")


def test_a_prompt_may_fill_the_room():
    assert len(text("x" * 200)) == 200
    encoder().check(RawPrompt("x" * 200, None), "row 0")


def test_settings_that_need_a_template():
    with pytest.raises(ConfigError, match="chat_template: always, but the tokenizer has no chat template"):
        encoder(None, chat_template="always")
    with pytest.raises(ConfigError, match=r"prompts.system_prompt: needs a chat template"):
        encoder(TEMPLATE, chat_template="never", system_prompt="Be brief.")
