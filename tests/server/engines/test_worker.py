"""Padding of steps: few numbers of rows, never fewer than asked or more than there is room for."""

from guiderail.server.engines.vllm.worker import own_memory, padded_rows


def test_few_numbers_of_rows_each_enough() -> None:
    padded = [padded_rows(rows, 250) for rows in range(1, 251)]
    assert all(rows <= made <= min(250, rows + 7) for rows, made in enumerate(padded, 1))
    assert padded[:32] == list(range(1, 33))
    assert len(set(padded[32:])) == 28


def test_own_memory_is_what_no_file_is_behind_in_whole_huge_pages() -> None:
    maps = """\
7f0000100000-7f0000a00000 rw-p 00000000 00:00 0
7f0000b00000-7f0000c00000 rw-p 00000000 00:00 0
7f0001000000-7f0001400000 rw-p 00000000 00:00 0                          [heap]
7f0002000000-7f0002400000 r--p 00000000 00:00 0
7f0003000000-7f0003400000 rw-s 00000000 00:01 7                          /dev/shm/x
7f0004000000-7f0004400000 rw-p 00001000 fe:00 12                         /usr/lib/libx.so
7ffc00000000-7ffc00400000 rw-p 00000000 00:00 0                          [stack]
"""
    assert list(own_memory(maps)) == [(0x7F0000200000, 0x800000), (0x7F0001000000, 0x400000)]
