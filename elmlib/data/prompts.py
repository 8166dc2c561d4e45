"""The chat prompt of each task, cut where the text goes; all constants of the prompt format are here."""

from typing import Any, NamedTuple

from jinja2 import TemplateError

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
    template without the slot and for a tokenizer without a chat template."""
    check_template(template)
    name = f"the tokenizer of {tokenizer.name_or_path!r}"
    if not tokenizer.chat_template or tokenizer.eos_token_id is None:
        raise InputError(f"{name} has no chat template or no end of sequence; use an instruct model")
    user = {"role": "user", "content": template.replace(SLOT, _MARK)}
    try:
        question = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        chat = tokenizer.apply_chat_template([user, {"role": "assistant", "content": _MARK}], tokenize=False)
    except TemplateError as error:
        raise InputError(f"{name} has a chat template that fails: {error}") from error
    if (question.count(_MARK), chat.count(_MARK)) != (1, 2):
        raise InputError(f"{name} has a chat template that drops or repeats a text; use another instruct model")
    before, behind = question.split(_MARK)
    closing = tokenizer(chat.rsplit(_MARK, 1)[1], add_special_tokens=False).input_ids
    # Some templates close a turn without a special token; the answer then ends with the tokenizer's own EOS.
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    end_of_turn = next((token for token in closing if token in special), tokenizer.eos_token_id)
    # The chat template writes BOS itself where the model wants one, so the tokenizer must not add a second.
    return PromptIds(
        tokenizer(before, add_special_tokens=False).input_ids,
        tokenizer(behind, add_special_tokens=False).input_ids,
        end_of_turn,
    )
