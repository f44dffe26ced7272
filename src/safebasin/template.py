"""The chat template of a model: rendering, and its arguments, which are pinned into its text.

Here errors of a chat template become ours.
"""

import contextlib
import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from safebasin.console import printable
from safebasin.data.example import Example
from safebasin.data.files import cause
from safebasin.data.keys import THOUGHTS
from safebasin.errors import UserError

DATE = "2026-01-01"  # that a template with a clock reads, where the recipe names no other
PINNED = "{#- pinned by safebasin -#}"
MARKS = (*"aAbBcdeDFHIjmMpRSTUwWxXyYZz", "-d", "-m", "-H", "-I", "-M", "-S", "-j", "-y")  # of strftime
RENDERERS = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}
WORDS = {"true", "false", "yes", "no", "on", "off"}  # which a recipe, YAML 1.2, reads as text, or where they are quoted
ARGUMENT = re.compile(r"[A-Za-z_]\w*")
CARRIED = ("tool_calls", "tool_call_id", "name")  # keys of a turn that a template may read, beside role and content


class TemplateFails(UserError):
    """The chat template fails on these messages; on others it may not."""


def check_template(tokenizer: Any) -> None:
    """UserError where the tokenizer has no chat template, or several of which none is the default."""
    if not tokenizer.chat_template:
        raise UserError(
            "the model's tokenizer has no chat template; use the instruct model, or save a template with its tokenizer"
        )
    if isinstance(tokenizer.chat_template, Mapping) and "default" not in tokenizer.chat_template:
        names = ", ".join(tokenizer.chat_template)
        raise UserError(f"the model's tokenizer has the chat templates {printable(names)}; name one of them default")


def template_text(tokenizer: Any) -> str:
    """The source of the template that conversations are rendered by."""
    check_template(tokenizer)
    template = tokenizer.chat_template
    return str(template["default"] if isinstance(template, Mapping) else template)


def template_digest(tokenizer: Any) -> str:
    """Digest of the chat template: training, scoring and measuring must agree on it."""
    return hashlib.blake2b(str(tokenizer.chat_template).encode(), digest_size=8).hexdigest()


def template_date(tokenizer: Any) -> str | None:
    """The day that a template with a clock reads; None for a template without one."""
    match = re.search(r"\{#- date (\S+) -#\}", template_text(tokenizer))
    return match[1] if match else None


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """All that can be said about arguments of a template without it.

    Raises:
        UserError: no name of a variable, one that the renderer sets itself, a date that is none.
    """
    for name, value in arguments.items():
        if not ARGUMENT.fullmatch(name) or name in RENDERERS:
            what = "set where a conversation is rendered" if name in RENDERERS else "no name of a variable"
            raise UserError(f"model.template: {name!r} is {what}; leave it out")
        if name == "learn_thoughts" and not isinstance(value, bool):
            raise UserError(f"model.template.learn_thoughts: true or false is needed, found {value!r}")
    try:
        datetime.datetime.fromisoformat(str(arguments.get("date", DATE)))
    except ValueError:
        raise UserError(f"model.template.date: {arguments['date']!r} is no date; write it as {DATE}") from None


def pin_template(tokenizer: Any, arguments: Mapping[str, Any]) -> None:
    """Write arguments of the template into its text, so that scan, training, measuring and serving render alike.

    ``date`` (2026-11-26) stops the template's clock; where it is not given and the template has one, that shows
    ``DATE``. ``learn_thoughts: false`` is read by ``encode``. Every other argument is a variable of the template.

    Raises:
        UserError: what ``check_arguments`` refuses, a variable that the template does not read, or a word in the place
            of true or false that it does not compare with.
    """
    text = template_text(tokenizer)
    if PINNED in text or not (arguments or "strftime_now" in text):
        return
    check_arguments(arguments)
    lines = [PINNED]
    if "date" in arguments or "strftime_now" in text:
        given = str(arguments.get("date", DATE))
        day = datetime.datetime.fromisoformat(given)
        steps = "".join(f"|replace('%{mark}', {json.dumps(day.strftime(f'%{mark}'))})" for mark in MARKS)
        lines.append(f"{{#- date {given} -#}}{{% macro strftime_now(format) %}}{{{{ format{steps} }}}}{{% endmacro %}}")
    for name, value in arguments.items():
        if name != "learn_thoughts" and not re.search(rf"\b{'strftime_now' if name == 'date' else name}\b", text):
            raise UserError(f"model.template: the model's chat template does not read {name!r}; leave it out")
        if str(value).lower() in WORDS and isinstance(value, str) and not re.search(rf"(['\"]){value}\1", text):
            raise UserError(f"model.template.{name}: {value!r} is a text, true to any template; write true or false")
        if name != "date":
            lines.append(f"{{% set {name} = {_literal(value)} %}}")
    pinned = "".join(lines) + text
    template = tokenizer.chat_template
    tokenizer.chat_template = {**template, "default": pinned} if isinstance(template, Mapping) else pinned


def _literal(value: Any) -> str:
    """A value as Jinja writes it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value).replace("{%", "{\\u0025").replace("{{", "{\\u007b").replace("{#", "{\\u0023")


def learns_thoughts(tokenizer: Any) -> bool:
    """Whether the thoughts that a template renders are learned: yes, unless ``learn_thoughts: false`` is pinned."""
    return PINNED not in (text := template_text(tokenizer)) or "{% set learn_thoughts = false %}" not in text


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    ask: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
    **variables: Any,
) -> str:
    """The conversation as the model's own chat template writes it.

    ``ask`` opens the assistant's turn; ``variables`` are what else the template reads.

    Raises:
        UserError: no chat template, or one that is not Jinja.
        TemplateFails: a UserError too; the template fails on these messages, or does not read a key of theirs.
    """
    how = {"tokenize": False, "add_generation_prompt": ask, **variables}
    return _apply(tokenizer, _turns(template_text(tokenizer), messages, tools), tools, **how)


def render_all(tokenizer: Any, examples: Sequence[Example]) -> list[str | TemplateFails]:
    """Every row as ``render`` writes it, in one call; where one fails or has tools, each alone, or how it fails."""
    template = template_text(tokenizer)
    if all(example.messages and not example.tools for example in examples):
        with contextlib.suppress(TemplateFails):
            turns = [_turns(template, example.messages) for example in examples]
            return _apply(tokenizer, turns, tokenize=False) if turns else []
    texts: list[str | TemplateFails] = []
    for example in examples:
        try:
            texts.append(render(tokenizer, example.messages, tools=example.tools))
        except TemplateFails as error:
            texts.append(error)
    return texts


def has_marks(tokenizer: Any) -> bool:
    """Whether the template marks what the assistant writes ({% generation %})."""
    return re.search(r"{%-?\s*generation\s*-?%}", template_text(tokenizer)) is not None


def generation_marks(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> Sequence[int]:
    """Of every token whether the template marks it as the assistant's ({% generation %}); empty where it has no marks.

    Raises:
        TemplateFails: see ``render``.
    """
    if not has_marks(tokenizer):
        return ()
    template = template_text(tokenizer)
    how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    return _apply(tokenizer, _turns(template, messages, tools), tools, **how)["assistant_masks"]


def _turns(
    template: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Turns as the template reads them.

    Raises:
        TemplateFails: it does not read a key of theirs.
    """
    turns = [_turn(template, turn) for turn in messages]
    if tools and not re.search(r"\btools\b", template):
        raise TemplateFails("the model's chat template does not read 'tools'")
    return turns


def _apply(tokenizer: Any, turns: Sequence[Any], tools: Sequence[Mapping[str, Any]] = (), **how: Any) -> Any:
    """What the template makes of one conversation, or of each of several."""
    if tools:
        how["tools"] = list(tools)
    try:
        return tokenizer.apply_chat_template(turns, **how)
    except TemplateSyntaxError as error:
        raise UserError(f"the model's chat template cannot be read: line {error.lineno}: {cause(error)}") from error
    except (TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise TemplateFails(f"the model's chat template fails: {cause(error)}") from error


def _turn(text: str, turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn with the keys that the template reads, by its names for them."""
    role = "system" if turn["role"] == "developer" and "developer" not in text else turn["role"]
    result = {"role": role, "content": turn["content"], **{key: turn[key] for key in CARRIED if key in turn}}
    if "reasoning_content" in turn:
        name = next((name for name in THOUGHTS if re.search(rf"\b{name}\b", text)), None)
        if name is None:
            raise TemplateFails("the model's chat template does not read 'reasoning_content'")
        result[name] = turn["reasoning_content"]
    if "tool_calls" in turn and "tool_calls" not in text:
        raise TemplateFails("the model's chat template does not read 'tool_calls'")
    return result
