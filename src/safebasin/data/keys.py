"""The one table of keys: what is read of a row and of its turns, what is harmless, and what is refused by its name.

A trainer that renders a key which the scan did not read would learn what nobody scored. So a key is read, or it is
harmless (no trainer renders it: ids, sources, numbers), or the row is refused with the key's name.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from safebasin.console import printable
from safebasin.errors import UserError

TURNS = ("messages", "conversations", "conversation")  # a list of turns
REQUESTS = ("instruction", "prompt", "question", "query", "problem", "user", "input")  # the first that a row has
ADDED = ("input", "context")  # to the request, after a blank line
ANSWERS = ("completion", "output", "response", "answer", "solution", "assistant")
SYSTEM = ("system", "system_prompt")
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
WEIGHTS = ("weight", "train", "training", "loss_mask", "loss")  # of a turn: 0 or false is not learned
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
TURN_KEYS = ("role", "from", "content", "value", "tool_calls", "tool_call_id", "name", *THOUGHTS, *WEIGHTS)

Key = Literal[
    "messages", "instruction", "prompt", "question", "input", "context", "completion", "system", "history", "tools",
    "chosen", "role", "content", "weight", "tool_calls", "reasoning_content",
]  # fmt: skip

HARMLESS = re.compile(
    r"(\w*[_-])?(id|ids|idx|index|uuid|guid|hash|sha\d*|md5|meta|metadata|info|sources?|origin|dataset|domain|subset"
    r"|split|category|categories|topics?|tags?|labels?|task|type|kind|lang|language|locale|licen[sc]e|ur[li]|link|doi"
    r"|author|model|generator|annotators?|date|time|timestamp|created|updated|created_at|updated_at|version|scores?"
    r"|rating|quality|difficulty|level|length|count|embedding|__index_level_\d+__|unnamed: \d+)_*",
    re.I,
)
# A CSV file has its numbers as text.
NUMBER = re.compile(r"\s*[-+]?(\d{1,40}(\.\d{0,40})?|\.\d{1,40})(e[-+]?\d{1,3})?\s*", re.I | re.ASCII)
TOKENS = "tokens of some tokenizer; rows are read as text"
LEARNING = re.compile("loss|mask|train|learn|weight|skip|ignore", re.I)  # a key of a turn that may say what is learned
MEDIA = "text alone is read, no pictures and no sound"
REFUSED = {
    "images": MEDIA,
    "image": MEDIA,
    "videos": MEDIA,
    "video": MEDIA,
    "audios": MEDIA,
    "audio": MEDIA,
    "chosen": "a preference pair; with `chosen: true` its chosen answer is learned",
    "rejected": "a preference pair; with `chosen: true` its chosen answer is learned",
    "kto_tag": "KTO rows, an answer with a verdict, are not for learning answers",
    "functions": "name them `tools`, or map them: `columns: {tools: functions}`",
    "function_call": "write it as `tool_calls`",
    "text": "text without turns; name its parts by the templates `prompt` and `answer`",
    "chat_template_kwargs": "arguments of the template stand in the recipe: `model.template`",
    **dict.fromkeys(
        (
            *("weight", "weights", "loss_weight", "loss_weights", "sample_weight", "sample_weights", "loss_scale"),
            *("train", "training", "trainable", "train_on_input", "train_on_inputs", "train_on_prompt"),
            *("mask", "masks", "loss_mask", "loss_masks", "assistant_mask", "assistant_masks", "attention_mask"),
        ),
        "what is learned is said by `weight` in each answer, 0 or 1",
    ),
    "train_detail": "a turn is learned as a whole or not at all: `weight`",
    "input_ids": TOKENS,
    "completion_mask": TOKENS,
    "pixel_values": MEDIA,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowForm:
    """How the rows of a set are read.

    Args:
        prompt: a template over the columns, for sets that are no chats: ``"Classify: {text}"``.
        answer: the same for the answer: ``"{label}"``.
        columns: names of the table of keys, and the names that these rows have for them: ``{messages: dialog}``.
        ignore: columns that no trainer renders, so that they need not be read.
        turns: "alternate": user and assistant in turn, user first; "any": in any order, ending with the assistant,
            with system and developer turns anywhere.
        chosen: of preference pairs, learn the chosen answer.
        delimiter: of a CSV file; empty: a comma, in a .tsv file a tab.
    """

    prompt: str = ""  # a template over the columns: "Classify: {text}"
    answer: str = ""  # the same for the answer
    # names of the table of keys, and the names that the rows have for them: {messages: dialog, content: text}
    columns: Mapping[Key, str] = dataclasses.field(default_factory=dict)
    ignore: tuple[str, ...] = ()  # columns that no trainer renders
    turns: Literal["alternate", "any"] = "alternate"  # any: users or answers in a row, system and developer anywhere
    chosen: bool = False  # of preference pairs, learn the chosen answer
    delimiter: str = ""  # of a CSV file; empty: a comma, in a .tsv file a tab

    def __post_init__(self) -> None:
        if len(self.delimiter) > 1 or self.delimiter in ('"', "\n", "\r"):
            raise UserError(f"delimiter: one character is needed, found {self.delimiter!r}; write a tab as $'\\t'")
        if unread := {*self.columns} - {*get_args(Key)}:
            keys = ", ".join(get_args(Key))
            raise UserError(f"columns: there is no key {printable(min(unread), 60)!r}; the keys are {keys}")
        theirs = [*self.columns.values()]
        if len({*theirs}) < len(theirs):
            raise UserError(f"columns: two names stand for one column of the rows: {', '.join(theirs)}")


PLAIN = RowForm()


def filled(value: Any) -> bool:
    """Whether a value says anything: tables fill the keys that a row lacks with nothing."""
    return value is not None and not (isinstance(value, str | list | tuple | Mapping) and len(value) == 0)


def is_flag(value: Any) -> bool:
    """Whether a value is true or false, or the text that a CSV file has for it."""
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false"))


def harmless(key: str, value: Any) -> bool:
    """Whether no trainer renders a column: by its name, or because its value holds no text."""
    if is_flag(value):
        return key not in REFUSED and key not in ("label", "labels")  # the verdict of a KTO row
    return not filled(value) or (key not in REFUSED and (HARMLESS.fullmatch(key) is not None or not _speaks(value)))


def _speaks(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_speaks, value.values()))
    return (isinstance(value, str) and not NUMBER.fullmatch(value)) or (
        isinstance(value, list | tuple) and any(map(_speaks, value))
    )
