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

    def combine(self, raw: Mapping[str, Array], transformed: Mapping[str, Array]) -> tuple[Array, Array] | None:
        """Scores [C] and ties [C] of a group of candidates from their rewards [C] by label; None without rewards.

        Raises FieldError if the values are beyond what can be combined.
        """
        labels = [label for label, weight in self.weights.items() if weight and label in transformed]
        if not labels:
            return None
        weights = np.array([self.weights[label] for label in labels])
        values = np.array([transformed[label] for label in labels]).T.copy()
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # checked, and named
                combined = checked(self.rule.combine(values, weights, labels))
        except ValueError as error:
            raise FieldError(AlignmentField("combine"), f": {error}") from error
        return combined, self.rule.ties(np.array([raw[label] for label in labels]).T, weights, labels)


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of a group of candidates, in their order. Immutable; what changes a score makes a new table.

    plain: the candidates as they were scored. raw, transformed: their rewards [C] by label. given: the combined scores
    and ties [C] of candidates that are not compared as a group of their own.
    """

    plain: tuple[Candidate, ...]
    raw: Mapping[str, Array]
    transformed: Mapping[str, Array]
    combination: Combination
    given: tuple[Array, Array] | None = None

    @staticmethod
    def join(tables: "Sequence[Scores]") -> "Scores":
        """All rows of the tables, of which there must be one at least, as one group: combined anew."""
        first = tables[0]
        raw = {label: np.concatenate([table.raw[label] for table in tables]) for label in first.raw}
        transformed = {label: np.concatenate([table.transformed[label] for table in tables]) for label in first.raw}
        return Scores(tuple(c for table in tables for c in table.plain), raw, transformed, first.combination)

    @cached_property
    def _rated(self) -> tuple[Array, Array] | None:
        return self.given if self.given is not None else self.combination.combine(self.raw, self.transformed)

    @property
    def combined(self) -> Array:
        """The scores [C] that selection compares. Raises FieldError if the rewards cannot be combined."""
        if self._rated is None:
            raise RewardFailed("(selection)", f"candidate {self.plain[0].index} was never rated")
        return self._rated[0]

    @property
    def ties(self) -> Array:
        """Order of candidates of equal score, [C], larger being better."""
        return np.zeros(len(self.plain)) if self._rated is None else self._rated[1]

    @property
    def order(self) -> list[int]:
        """Rows from the best to the worst."""
        return sorted(range(len(self.plain)), key=lambda row: (-self.combined[row], -self.ties[row]))

    @cached_property
    def candidates(self) -> tuple[Candidate, ...]:
        """The candidates with their scores."""
        return tuple(self.of(row, candidate) for row, candidate in enumerate(self.plain))

    def of(self, row: int, candidate: Candidate) -> Candidate:
        """The candidate with the scores of a row."""
        c, rated = candidate, self._rated
        return Candidate(  # not by dataclasses.replace, which takes several times as long
            c.index, c.text, c.token_ids, c.finish_reason, c.stop_reason, c.logprobs,
            {label: float(column[row]) for label, column in self.raw.items()},
            {label: float(column[row]) for label, column in self.transformed.items()},
            None if rated is None else float(rated[0][row]), 0.0 if rated is None else float(rated[1][row]),
            c.adjusted, c.weight,
        )  # fmt: skip

    def take(self, rows: Sequence[int]) -> "Scores":
        """These rows with the scores that they have here."""
        at, rated = list(rows), self._rated
        return self._rows(at, None if rated is None else (rated[0][at], rated[1][at]))

    def group(self, rows: Sequence[int]) -> "Scores":
        """These rows as a group of their own: combined anew."""
        return self._rows(list(rows), None)

    def _rows(self, at: list[int], given: tuple[Array, Array] | None) -> "Scores":
        raw = {label: column[at] for label, column in self.raw.items()}
        transformed = {label: column[at] for label, column in self.transformed.items()}
        return Scores(tuple(self.plain[row] for row in at), raw, transformed, self.combination, given)

    def with_combined(self, combined: Array) -> "Scores":
        """The table with other combined scores [C]; ties stay."""
        return replace(self, given=(combined, self.ties))
