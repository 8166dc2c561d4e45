"""The chat prompt of each task, cut where the soft tokens go; every constant of the prompt format is here."""

from typing import Any, NamedTuple

from elmlib.config import SoftTokenPlace

IGNORE_INDEX = -100
"""Label of a position that no loss looks at (PyTorch's own default in cross-entropy)."""

SLOT = "{text}"
"""Where a record's `input_prompt_template` takes the text, and the soft tokens in its stead."""

TASK_TEMPLATES = {
    "summary": "Summarize the following text:\n\n{text}\n\nSummary:",
    "keywords": "List the keywords of the following text:\n\n{text}\n\nKeywords:",
    "category": "Name the category of the following text:\n\n{text}\n\nCategory:",
}

OPENING_TEMPLATE = "Repeat the beginning of the following text:\n\n{text}\n\nBeginning:"
"""The prompt of the paraphrase stage, whose target is the text's own beginning."""

# No chat template or text contains this; it only marks the cut between the pieces of a rendered chat.
_MARK = "\u241eslot\u241e"


class PromptIds(NamedTuple):
    """A chat prompt as token ids, cut at the slot."""

    before: list[int]
    """All that stands before the text."""
    behind: list[int]
    """From the text to where the answer begins."""
    end_of_turn: int
    """The token that ends the answer."""

    def around(self, place: SoftTokenPlace) -> tuple[list[int], list[int]]:
        """What stands before soft tokens, the same for every row and so computed once, and between them and the answer.

        At the beginning of the answer nothing stands between: a row is a third shorter than with soft tokens in the
        text's stead, whose slot is then left empty.
        """
        return (self.before + self.behind, []) if place == "answer" else (self.before, self.behind)


def check_template(template: str) -> None:
    """Raise ValueError unless `template` holds the slot exactly once."""
    if template.count(SLOT) != 1:
        raise ValueError(f"prompt template {template!r} holds {SLOT} {template.count(SLOT)} times; expected once")


def prompt_ids(tokenizer: Any, template: str) -> PromptIds:
    """Render `template` as one user turn of the tokenizer's chat format and cut it at the slot.

    Raises ValueError where the template lacks the slot or the tokenizer has no chat template.
    """
    check_template(template)
    if tokenizer.chat_template is None:
        raise ValueError(f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; use an instruct model")
    user = {"role": "user", "content": template.replace(SLOT, _MARK)}
    asked = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    before, after = asked.split(_MARK)
    answered = tokenizer.apply_chat_template([user, {"role": "assistant", "content": _MARK}], tokenize=False)
    closing = tokenizer(answered.rsplit(_MARK, 1)[1], add_special_tokens=False).input_ids
    # A template that closes its turn with no special token leaves the end to the tokenizer's own EOS.
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    end_of_turn = next((token for token in closing if token in special), tokenizer.eos_token_id)
    # The chat template writes BOS itself where the model wants one, so the tokenizer must not add a second.
    return PromptIds(
        tokenizer(before, add_special_tokens=False).input_ids,
        tokenizer(after, add_special_tokens=False).input_ids,
        end_of_turn,
    )
