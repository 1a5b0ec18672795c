"""Prompters: from a conversation to the model's prompt, and from its output to the answer. They know no engine."""

from guiderail.guides.prompters.prompter import Cleaner, Prompter, Template, with_system
from guiderail.guides.prompters.system_message import SystemMessage
from guiderail.guides.prompters.urial.styles import Style, load_style
from guiderail.guides.prompters.urial.urial import Urial, urial_with

PROMPTERS: dict[str, type[Prompter]] = {cls.name: cls for cls in (Template, Urial, SystemMessage)}

__all__ = [
    "PROMPTERS",
    "Cleaner",
    "Prompter",
    "Style",
    "SystemMessage",
    "Template",
    "Urial",
    "load_style",
    "urial_with",
    "with_system",
]
