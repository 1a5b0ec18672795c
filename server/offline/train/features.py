"""Features of answers: the backbone's last hidden state of prompt plus answer, after its final norm.

A reward model reads the state at the last token of the answer's turn (Christiano et al. 2017, as
applied to language models by Ziegler et al. 2019). The sequence is: chat template of the messages
with the generation prompt, the answer's tokens, the template's end-of-turn token. Longer ones lose
tokens on their left, so that they always end with that token.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from guiderail.guides.core.types import Message
from guiderail.server.models.renderer import ChatRenderer
from guiderail.server.offline.journal import Journal
from guiderail.server.offline.train.pairs import Pair, TrainingError

# The plain batched forward below repeats the prompt for each answer. The runner of
# server/rewards/models/packed.py, which the server scores with, will replace it if it is faster.
BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class AnswerTokens:
    """Tokens that the backbone reads for one answer; `answer_length` is before any cut, without end of turn."""

    ids: tuple[int, ...]
    answer_length: int
    cut: int


def end_of_turn(renderer: ChatRenderer) -> int:
    """Token that ends an assistant's turn in this chat template. Raises TrainingError if none is found."""
    if not renderer.has_chat_template:
        raise TrainingError("this base has no chat template (it is a base model): choose an instruction-tuned one")
    asked = (Message("user", "a"),)
    before = [*renderer.render(asked).token_ids, *renderer.encode("b")]
    whole = renderer.render((*asked, Message("assistant", "b")), add_generation_prompt=False).token_ids
    if list(whole[: len(before)]) != before or len(whole) == len(before):
        raise TrainingError("the base's chat template does not put the answer directly after the generation prompt")
    return whole[len(before)]


def answer_tokens(
    renderer: ChatRenderer, end: int, messages: Sequence[Message], answer: str, max_tokens: int
) -> AnswerTokens:
    """Token ids of prompt, answer and end of turn: the last `max_tokens` of them.

    Raises RequestError if the chat template refuses the messages.
    """
    answer_ids = renderer.encode(answer, plain=True)
    ids = [*renderer.render(messages).token_ids, *answer_ids, end]
    return AnswerTokens(tuple(ids[-max_tokens:]), len(answer_ids), max(0, len(ids) - max_tokens))


def tokenize(renderer: ChatRenderer, pairs: Sequence[Pair], max_tokens: int) -> list[AnswerTokens]:
    """Sequences of all answers: chosen of pair i at 2i, rejected at 2i + 1."""
    end = end_of_turn(renderer)
    return [
        answer_tokens(renderer, end, pair.messages, answer, max_tokens)
        for pair in pairs
        for answer in (pair.chosen, pair.rejected)
    ]


def load_backbone(folder: str) -> Any:
    """The transformer without its language-model head, float32, evaluation mode, no gradients. Raises OSError."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def last_states(model: Any, sequences: Sequence[Sequence[int]]) -> Tensor:
    """States [B, H] float32 at the last token of each sequence. Differentiable where the model's weights are."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    # Padding goes on the right, where a causal model cannot see it, so the pad id does not matter.
    ids = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    states = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return states[torch.arange(len(sequences)), lengths - 1]


def features(
    model: Any, sequences: Sequence[Sequence[int]], title: str = "features", journal: Journal | None = None
) -> Tensor:
    """States [S, H] float32 of all sequences, in their order; batched by length. The bar is in tokens.

    Batches found in the journal under this title are not computed again; the others are added to it. Batches are the
    same in every run, and therefore the states too.
    """
    kept = journal or Journal()
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
    found: list[Tensor] = []
    total = sum(len(ids) for ids in sequences)
    with torch.no_grad(), tqdm(total=total, unit="tok", unit_scale=True, desc=title, disable=None) as bar:
        start = 0
        while start < len(order):
            count = max(1, BATCH_TOKENS // len(sequences[order[start]]))
            batch = [sequences[index] for index in order[start : start + count]]
            key = f"{title} {start}"
            if key not in kept:
                kept.keep(key, _packed(last_states(model, batch).float()))
            found.append(_unpacked(kept[key], len(batch)))
            bar.update(sum(len(ids) for ids in batch))
            start += count
    together = torch.cat(found)
    result = torch.empty_like(together)
    result[torch.tensor(order)] = together
    return result


def _packed(states: Tensor) -> str:
    """States [B, H] float32 as text: base64 of their bytes."""
    return base64.b64encode(states.contiguous().numpy().tobytes()).decode()


def _unpacked(text: str, count: int) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), np.float32).reshape(count, -1).copy())
