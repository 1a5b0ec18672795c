"""Padding of steps: few numbers of rows, never fewer than asked or more than there is room for."""

from guiderail.server.engines.vllm_worker import padded_rows


def test_few_numbers_of_rows_each_enough() -> None:
    padded = [padded_rows(rows, 250) for rows in range(1, 251)]
    assert all(rows <= made <= min(250, rows + 7) for rows, made in enumerate(padded, 1))
    assert padded[:32] == list(range(1, 33))
    assert len(set(padded[32:])) == 28
