"""Prompts to send: the short built-in list, or a file of the user's."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from guiderail.loadtest.load.text_file import lines_of, parse_json, read_text
from guiderail.loadtest.loadtest_error import LoadtestError

Prompt = str | list[dict[str, Any]]


def shipped() -> list[Prompt]:
    """The prompts that come with the package: plain questions and small writing tasks, 5 to 20 words each."""
    text = (files("guiderail.loadtest.load") / "prompts.txt").read_text("utf-8")
    return [line for line in lines_of(text) if line]


def load(path: Path) -> list[Prompt]:
    """The prompts of a file, in order. `.jsonl`: a string, {"prompt": text} or {"messages": [...]} per line;
    anything else: one prompt per line. Blank lines are skipped. Raises LoadtestError with the line at fault."""
    lines = lines_of(read_text(path, "prompts"))
    parse = _json_prompt if path.suffix == ".jsonl" else lambda line, where: line
    prompts = [parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise LoadtestError(f"prompts {path}: the file has no prompts")
    return prompts


def _json_prompt(line: str, where: str) -> Prompt:
    try:
        value: Any = parse_json(line)
    except ValueError as error:
        raise LoadtestError(f"{where}: {error}") from error
    if isinstance(value, dict):
        value = value.get("messages", value.get("prompt"))
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(turn, dict) and "role" in turn for turn in value):
        return value
    raise LoadtestError(f'{where}: expected a string, {{"prompt": "..."}} or {{"messages": [{{"role": ...}}]}}')


def as_body(prompt: Prompt, chat: bool, prefix: str) -> dict[str, Any]:
    """The field of a request that carries the prompt, with `prefix` before its first words."""
    if isinstance(prompt, str):
        text = prefix + prompt
        return {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    if not chat:
        raise LoadtestError("prompts with messages need a chat endpoint (--endpoint /v1/chat/completions)")
    first = prompt[0]
    if prefix and not isinstance(first.get("content"), str):
        raise LoadtestError("--unique-prompts needs messages whose content is text")
    return {"messages": [{**first, "content": prefix + first["content"]}, *prompt[1:]] if prefix else prompt}
