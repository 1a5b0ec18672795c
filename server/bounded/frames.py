"""Messages over a pipe: a length in four bytes, then so many bytes."""

from typing import IO


def write_frame(pipe: IO[bytes], message: bytes) -> None:
    """Write a message. Raises OSError if nobody reads."""
    left = memoryview(len(message).to_bytes(4, "big") + message)
    while left:
        left = left[pipe.write(left) :]  # an unbuffered pipe takes what it has room for
    pipe.flush()


def read_frame(pipe: IO[bytes], most: int = 2**32 - 1) -> bytes:
    """Read a message of at most so many bytes. Raises EOFError at the end, ValueError for a longer one."""
    size = int.from_bytes(_exactly(pipe, 4), "big")
    if size > most:
        raise ValueError(f"a message of {size} bytes; at most {most} are read")
    return _exactly(pipe, size)


def _exactly(pipe: IO[bytes], size: int) -> bytes:
    parts = []
    while size:
        part = pipe.read(size)  # an unbuffered pipe gives what is there
        if not part:
            raise EOFError("the other end is gone")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
