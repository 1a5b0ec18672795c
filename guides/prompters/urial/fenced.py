"""Find the end of an answer between fences while it is being generated; code blocks inside it are kept.

The answer begins after its opening fence. Its end is found line by line. A line of backticks alone that closes no code
block ends the answer if nothing, an empty line or a heading follows; if other text follows it opens a code block.
Without such a line the answer ends at a heading that directly follows a code block, or that opens a new turn: alone on
its line with a fence on the next (outside of code also an empty line or nothing). White space around the answer is
dropped.

So a code block that begins with an empty line must name its language, and a comment `# Query:` inside a code block
stays unless a fence follows directly. The engine's stop strings are only the openings of turns: a stop at `# Query`
would cut such comments, and one with the closing fence would remove the last line of a code block.
"""

import re

from guiderail.guides.prompters.prompter import Cleaner
from guiderail.guides.prompters.urial.layout import FENCE

# Under a repetition penalty, models avoid the words of the prompt and write other headings with the same meaning.
_NAMES = ("# Query", "# Question", "# Answer", "# Response", "# User")
STOPS = tuple(f"\n{name}:\n{FENCE}" for name in _NAMES)

_HEADING = re.compile(rf"(?:{'|'.join(_NAMES)})(?::.*|\s*)")
_OPENING = re.compile(rf"(?:{'|'.join(_NAMES)}):?\s*")
_BARE = re.compile(r"`{3,}\s*")
_BARE_SO_FAR = re.compile(r"`+\s*")
# Small models also put a fence after text on the same line.
_BEGINS_CODE = re.compile(r"\s*`{3,}[^`]*|(?:(?!```).)*`{3,}[^\s`]*\s*")
_ENDS_CODE = re.compile(r"(?:(?!```).)*`{3,}\s*")


class FencedCleaner(Cleaner):
    """Cleaner that keeps an answer up to its closing fence. `continued` is the part that stands in the prompt."""

    def __init__(self, continued: str = "") -> None:
        self._text = continued
        self._begin = len(continued)
        self._shown = len(continued)
        self._at = 0  # start of the first undecided line
        self._end: int | None = None
        self._in_code = False
        self._after_code = False
        self._started = bool(continued)

    def push(self, text: str) -> str:
        self._text += text
        self._scan(last=False)
        return self._show(self._safe())

    def finish(self) -> str:
        self._scan(last=True)
        return self._show(len(self._text) if self._end is None else self._end)

    def _scan(self, *, last: bool) -> None:
        """Decide on lines from `_at` on, as far as the text after them is known."""
        while self._end is None and self._at < len(self._text):
            line = self._line(self._at, last)
            if line is None:
                return
            after = self._at + len(line) + 1
            if self._at >= self._begin and (ends := self._ends(line, self._line(after, last))) is not False:
                if ends:
                    self._end = self._at
                return
            if (_ENDS_CODE if self._in_code else _BEGINS_CODE).fullmatch(line):
                self._in_code = not self._in_code
            if line.strip():
                self._after_code = _BARE.fullmatch(line) is not None and not self._in_code
            self._at = after

    def _ends(self, line: str, following: str | None) -> bool | None:
        """True if the answer ends before `line`; None while that depends on a line that has not arrived."""
        if self._after_code and _HEADING.fullmatch(line):
            return True
        closing = _BARE.fullmatch(line) and not self._in_code
        opening = _OPENING.fullmatch(line)
        if not (closing or opening):
            return False
        if following is None:
            return None
        if closing:
            return not following.strip() or _OPENING.fullmatch(following) is not None
        return following.startswith(FENCE) or not (following.strip() or self._in_code)

    def _line(self, start: int, last: bool) -> str | None:
        """The line from `start`; None while its end has not arrived."""
        end = self._text.find("\n", start)
        if end < 0 and not last:
            return None
        return self._text[start : end if end >= 0 else None]

    def _safe(self) -> int:
        """End of the text that belongs to the answer whatever comes next (trailing white space apart)."""
        if self._end is not None:
            return self._end
        rest = self._text[self._at :]
        held = "\n" in rest or _BARE_SO_FAR.fullmatch(rest) or any(_agree(rest, name) for name in _NAMES)
        return self._at if held else len(self._text)

    def _show(self, upto: int) -> str:
        piece = self._text[self._shown : upto].rstrip()
        if not piece:
            return ""
        self._shown += len(piece)
        if not self._started:
            self._started, piece = True, piece.lstrip()
        return piece


def _agree(a: str, b: str) -> bool:
    """True if one of the two begins with the other."""
    return a.startswith(b) or b.startswith(a)
