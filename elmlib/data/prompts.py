"""The chat prompt of each task, cut where the text goes; all constants of the prompt format are here."""

from itertools import product
from typing import Any, NamedTuple

from elmlib.config import InputError, SoftTokenPosition

IGNORE_INDEX = -100  # label of a position that no loss looks at: PyTorch's own default in cross-entropy
SLOT = "{text}"  # where a record's `input_prompt_template` takes the text
TASK_TEMPLATES = {
    "summary": "Summarize the following text:\n\n{text}\n\nSummary:",
    "keywords": "List the keywords of the following text:\n\n{text}\n\nKeywords:",
    "category": "Name the category of the following text:\n\n{text}\n\nCategory:",
}

# No chat template or text contains this; it only marks the cut between the pieces of a rendered chat.
_MARK = "\u241eslot\u241e"


class PromptIds(NamedTuple):
    """A chat prompt as token ids: before the text, from the text to the answer, and the token that ends the answer."""

    before: list[int]
    behind: list[int]
    end_of_turn: int

    def around(self, position: SoftTokenPosition) -> tuple[list[int], list[int]]:
        """The tokens before the soft tokens, equal for all rows and so computed once, and those up to the answer.
        `before_answer`: the slot stays empty and nothing stands between soft tokens and answer, which makes a row a
        third shorter. `in_prompt`: the soft tokens take the place of the text."""
        return (self.before + self.behind, []) if position == "before_answer" else (self.before, self.behind)


def check_template(template: str) -> None:
    """Raise InputError unless `template` holds the slot exactly once."""
    if template.count(SLOT) != 1:
        raise InputError(f"prompt template {template!r} holds {SLOT} {template.count(SLOT)} times; expected once")


def prompt_ids(tokenizer: Any, template: str) -> PromptIds:
    """Render `template` as one user turn of the tokenizer's chat format and cut it at the slot. Raises InputError for a
    template without the slot, and for a tokenizer whose chat format is missing or of no use."""
    check_template(template)
    if tokenizer.chat_template is None:
        raise InputError(f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; use an instruct model")
    question, chat = _render(tokenizer, template.replace(SLOT, _MARK))
    before, behind = question.split(_MARK)
    # A template may drop the assistant's words; what ends a turn is then unknown.
    closing = tokenizer(chat.split(_MARK)[-1] if chat.count(_MARK) > 1 else "", add_special_tokens=False).input_ids
    # Some templates close a turn without a special token; the answer then ends with the tokenizer's own EOS.
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    end_of_turn = next((token for token in closing if token in special), tokenizer.eos_token_id)
    if end_of_turn is None:
        raise InputError(f"{tokenizer.name_or_path!r} has no token that ends a turn and no EOS; use an instruct model")
    # The chat template writes BOS itself where the model wants one, so the tokenizer must not add a second.
    return PromptIds(
        tokenizer(before, add_special_tokens=False).input_ids,
        tokenizer(behind, add_special_tokens=False).input_ids,
        end_of_turn,
    )


def _render(tokenizer: Any, text: str) -> tuple[str, str]:
    """A chat that asks `text`, and the same chat with an answer. Some templates take text parts only, and some want a
    system turn: the first form that keeps the text is taken."""
    from jinja2 import TemplateError

    def render(**turns: str) -> str:
        parts = {role: [{"type": "text", "text": words}] if as_parts else words for role, words in turns.items()}
        chat = [{"role": role, "content": content} for role, content in parts.items()]
        # Hybrid models (Qwen3) would think aloud before the answer; other templates do not know the variable.
        options = {"add_generation_prompt": "assistant" not in turns, "enable_thinking": False}
        return tokenizer.apply_chat_template(chat, tokenize=False, **options)

    problem = ""
    for as_parts, system in product((False, True), ({}, {"system": "You are a helpful assistant."})):
        try:
            question = render(**system, user=text)
            # A template that writes strings would write the list of parts as Python does, its newlines escaped.
            if (count := question.count(text.strip() if as_parts else _MARK)) == 1:
                return question, render(**system, user=text, assistant=_MARK)
            problem = problem or f"writes the user's text {count} times, expected once"
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            problem = problem or f"raises {type(error).__name__}: {error}"
    raise InputError(f"the chat template of {tokenizer.name_or_path!r} {problem}; use another instruct model")
