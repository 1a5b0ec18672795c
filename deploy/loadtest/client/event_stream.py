"""Parser of server-sent events from the pieces in which they arrive (WHATWG HTML, section 9.2).

Lines may end in LF or CR LF. A bare CR, which the standard also allows, does not count as a line end: no known server
sends one. The last event may lack its empty line, which the standard does not allow and some servers do.
"""

Event = tuple[str, bytes]


class SseParser:
    """Parser state: the unfinished event, kept from one piece to the next."""

    __slots__ = ("_begun", "_data", "_name", "_tail")

    def __init__(self) -> None:
        self._tail = b""
        self._name = ""
        self._data: list[bytes] = []
        self._begun = False

    def feed(self, piece: bytes) -> list[Event]:
        """The events that `piece` completes, each as its name ("" if unnamed) and its data. Comments are dropped."""
        lines = (self._tail + piece).split(b"\n")
        self._tail = lines.pop()
        events: list[Event] = []
        for raw in lines:
            line = raw.removesuffix(b"\r")
            if not self._begun:
                self._begun, line = True, line.removeprefix(b"\xef\xbb\xbf")
            if not line:
                if self._data:
                    events.append((self._name, b"\n".join(self._data)))
                self._name, self._data = "", []
            elif line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif line.startswith(b"event:"):
                self._name = line[6:].removeprefix(b" ").decode(errors="replace")
        return events

    def close(self) -> list[Event]:
        """The event that the end of the stream completes, if there is one."""
        return self.feed(b"\n\n")
