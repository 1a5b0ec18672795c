"""Tables of what rewards say of candidates, and how the rewards of a group of candidates become one score each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from guiderail.guides.core.errors import AlignmentField, FieldError, RewardFailed
from guiderail.guides.core.types import Candidate
from guiderail.guides.scoring.combine import Combine
from guiderail.guides.scoring.transforms import Array, checked


@dataclass(frozen=True, slots=True)
class Combination:
    """A request's rule that makes one score of rewards, and their weights by label; weight 0 only reports."""

    rule: Combine
    weights: Mapping[str, float]

    def combine(self, transformed: Mapping[str, Array]) -> Array | None:
        """Scores [C] of a group of candidates from their transformed rewards [C] by label; None without rewards.

        Raises FieldError if the values are beyond what can be combined.
        """
        labels = self._labels(transformed)
        if not labels:
            return None
        values = np.array([transformed[label] for label in labels]).T.copy()
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # checked, and named
                return checked(self.rule.combine(values, self._array(labels), labels))
        except ValueError as error:
            raise FieldError(AlignmentField("combine"), f": {error}") from error

    def ties(self, raw: Mapping[str, Array]) -> Array | None:
        """Order [C] of candidates of equal score from their raw rewards [C] by label; None without rewards."""
        labels = self._labels(raw)
        if not labels:
            return None
        return self.rule.ties(np.array([raw[label] for label in labels]).T, self._array(labels), labels)

    def _labels(self, rewards: Mapping[str, Array]) -> list[str]:
        return [label for label, weight in self.weights.items() if weight and label in rewards]

    def _array(self, labels: Sequence[str]) -> Array:
        return np.array([self.weights[label] for label in labels])


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of a group of candidates, in their order. Immutable; what changes a score makes a new table.

    plain: the candidates as they were scored. raw, transformed: their rewards [C] by label. given_combined, given_ties:
    combined scores and ties [C] that do not follow from the rewards of this group alone.
    """

    plain: tuple[Candidate, ...]
    raw: Mapping[str, Array]
    transformed: Mapping[str, Array]
    combination: Combination
    given_combined: Array | None = None
    given_ties: Array | None = None

    @staticmethod
    def join(tables: "Sequence[Scores]") -> "Scores":
        """All rows of the tables, of which there must be one at least, as one group: combined anew."""
        first = tables[0]
        if len(tables) == 1:
            return Scores(first.plain, first.raw, first.transformed, first.combination)
        raw = {label: np.concatenate([table.raw[label] for table in tables]) for label in first.raw}
        transformed = {label: np.concatenate([table.transformed[label] for table in tables]) for label in first.raw}
        return Scores(tuple(c for table in tables for c in table.plain), raw, transformed, first.combination)

    @staticmethod
    def gather(places: "Sequence[tuple[Scores, int]]") -> "Scores":
        """Rows of tables, at least one, as one group: combined anew. places: (table, row) of each."""
        first = places[0][0]
        raw = {label: np.array([table.raw[label][row] for table, row in places]) for label in first.raw}
        transformed = {label: np.array([table.transformed[label][row] for table, row in places]) for label in first.raw}
        return Scores(tuple([table.plain[row] for table, row in places]), raw, transformed, first.combination)

    @cached_property
    def _combined(self) -> Array | None:
        return self.combination.combine(self.transformed) if self.given_combined is None else self.given_combined

    @property
    def combined(self) -> Array:
        """The scores [C] that selection compares. Raises FieldError if the rewards cannot be combined."""
        if self._combined is None:
            raise RewardFailed("(selection)", f"candidate {self.plain[0].index} was never rated")
        return self._combined

    @cached_property
    def ties(self) -> Array:
        """Order of candidates of equal score, [C], larger being better."""
        ties = self.combination.ties(self.raw) if self.given_ties is None else self.given_ties
        return np.zeros(len(self.plain)) if ties is None else ties

    @property
    def order(self) -> list[int]:
        """Rows from the best to the worst."""
        best_first: list[int] = np.lexsort((-self.ties, -self.combined)).tolist()
        return best_first

    @cached_property
    def candidates(self) -> tuple[Candidate, ...]:
        """The candidates with their scores."""
        return self.judged()

    def judged(self, weights: Array | None = None, adjusted: Array | None = None) -> tuple[Candidate, ...]:
        """The candidates with their scores, and with the weights and scores [C] of a selection rule that gives such."""
        count = len(self.plain)
        rows = zip(
            self.plain, _by_label(self.raw, count), _by_label(self.transformed, count), _listed(self._combined, count),
            self.ties.tolist(), _listed(adjusted, count), _listed(weights, count), strict=True,
        )  # fmt: skip
        return tuple(
            [  # not by dataclasses.replace, which takes several times as long
                Candidate(
                    c.index, c.text, c.token_ids, c.finish_reason, c.stop_reason, c.logprobs,
                    raw, transformed, combined, tie, adjusted_, weight,
                )
                for c, raw, transformed, combined, tie, adjusted_, weight in rows
            ]
        )  # fmt: skip

    def of(self, row: int, candidate: Candidate) -> Candidate:
        """The candidate with the scores of a row."""
        return replace(self.take([row]), plain=(candidate,)).candidates[0]

    def take(self, rows: Sequence[int]) -> "Scores":
        """These rows with the scores that they have here."""
        at = list(rows)
        return self._rows(at, None if self._combined is None else self._combined[at], self.ties[at])

    def group(self, rows: Sequence[int]) -> "Scores":
        """These rows as a group of their own: combined anew."""
        return self._rows(list(rows), None, None)

    def _rows(self, at: list[int], combined: Array | None, ties: Array | None) -> "Scores":
        raw = {label: column[at] for label, column in self.raw.items()}
        transformed = {label: column[at] for label, column in self.transformed.items()}
        return Scores(tuple([self.plain[row] for row in at]), raw, transformed, self.combination, combined, ties)

    def with_combined(self, combined: Array) -> "Scores":
        """The table with other combined scores [C]; ties stay."""
        return Scores(self.plain, self.raw, self.transformed, self.combination, combined, self.given_ties)


def _by_label(columns: Mapping[str, Array], count: int) -> list[dict[str, float]]:
    """The columns [count] as one mapping by label for each row."""
    if not columns:
        return [{} for _ in range(count)]
    rows = zip(*[column.tolist() for column in columns.values()], strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _listed(column: Array | None, count: int) -> Sequence[float | None]:
    return [None] * count if column is None else column.tolist()
