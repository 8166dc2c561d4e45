"""Chat templates of every kind give the prompt as people would write it, or one line that says what is wrong."""

import pytest
from conftest import CHAT_TEMPLATE, make_tokenizer

from elmlib.config import InputError
from elmlib.data.prompts import TASK_TEMPLATES, PromptIds, prompt_ids

TEMPLATE = TASK_TEMPLATES["summary"]
QUESTION = "<|im_start|>user\nSummarize the following text:\n\n|\n\nSummary:<|im_end|>\n<|im_start|>assistant\n"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
WANTS_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system turn must come first') }}{% endif %}"
)
PARTS = CHAT_TEMPLATE.replace(
    "message['content']", "(message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join)"
)
# As Qwen3 does: an answer is written with an empty think block; where nobody says otherwise, the model opens its own.
THINKS = CHAT_TEMPLATE.replace(
    "{{ '<|im_start|>assistant\n' }}",
    "{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}",
)


def rendered(prompt: PromptIds) -> str:
    tokenizer = make_tokenizer()
    return f"{tokenizer.decode(prompt.before)}|{tokenizer.decode(prompt.behind)}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHAT_TEMPLATE, QUESTION),
        (PARTS, QUESTION),
        (CHAT_TEMPLATE.replace("message['content']", "message['content'][0]['text']"), QUESTION),
        (WANTS_SYSTEM + CHAT_TEMPLATE, SYSTEM + QUESTION),
        (WANTS_SYSTEM + PARTS, SYSTEM + QUESTION),
        (THINKS, QUESTION + "<think>\n\n</think>\n\n"),
    ],
    ids=["plain", "parts", "first part", "system", "system and parts", "thinking"],
)
def test_a_chat_template_of_every_kind(template: str, expected: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    prompt = prompt_ids(tokenizer, TEMPLATE)
    assert rendered(prompt) == expected and prompt.end_of_turn == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[-1]['role'] }}", "writes the user's text 0 times, expected once; use another instruct model"),
        (CHAT_TEMPLATE + CHAT_TEMPLATE, "writes the user's text 2 times, expected once"),
        ("{{ raise_exception('no users') }}", "raises TemplateError: no users"),
        ("{% for", "raises TemplateSyntaxError: "),
        ("{{ messages[0]['content'] + 1 }}", "raises TypeError: "),
        ("{{ messages[0].name.first }}", "raises UndefinedError: "),
    ],
)
def test_a_chat_template_of_no_use_is_one_line(template: str, message: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.name_or_path = "some/model"
    tokenizer.chat_template = template
    with pytest.raises(InputError) as refused:
        prompt_ids(tokenizer, TEMPLATE)
    assert str(refused.value).startswith("the chat template of 'some/model' ") and message in str(refused.value)


def test_a_template_that_drops_the_answer_ends_turns_with_eos() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] + '<|im_start|>' }}"
    assert prompt_ids(tokenizer, TEMPLATE).end_of_turn == tokenizer.eos_token_id


def test_a_tokenizer_without_eos_ends_turns_as_its_template_does() -> None:
    tokenizer = make_tokenizer()
    end = tokenizer.eos_token_id
    tokenizer.eos_token = tokenizer.pad_token = None
    assert prompt_ids(tokenizer, TEMPLATE).end_of_turn == end
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(InputError, match="no token that ends a turn and no EOS"):
        prompt_ids(tokenizer, TEMPLATE)
