"""Thirty seeded requests of many guides, asked alone, again, and beside each other and strangers."""

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx

# Long enough (over 96 tokens) that attention alone would be split otherwise than beside others.
SYSTEM = (
    "You are a patient guide through a large old city with a harbour, three museums, a market hall and many small "
    "streets. Visitors ask you about food, about history, about the weather, about how to get from one place to "
    "another, and about what to do when it rains all day. You answer kindly, in plain words, with one concrete "
    "example each time, and you never send anybody to a place that is closed on the day on which they ask. "
)
REWARDS = [{"name": "sentiment"}, {"name": "length", "target": 12, "weight": 0.5}]
KINDS: dict[str, dict[str, Any]] = {
    "sampling": {"alignment": {"guide": "sampling"}},
    "sampling, top_p": {"alignment": {"guide": "sampling"}, "top_p": 0.9, "presence_penalty": 0.3},
    "best_of_n": {"alignment": {"guide": {"name": "best_of_n", "n": 4}, "rewards": REWARDS}},
    "best_of_n, softmax": {
        "alignment": {"guide": {"name": "best_of_n", "n": 3}, "rewards": ["sentiment"], "select": "softmax"}
    },
    "speculative_rejection": {"alignment": {"guide": {"name": "speculative_rejection", "n": 4}, "rewards": REWARDS}},
    "controlled_decoding": {
        "alignment": {"guide": {"name": "controlled_decoding", "k": 3, "block": 5}, "rewards": REWARDS}
    },
    "transfer_q": {"alignment": {"guide": {"name": "transfer_q", "top_k": 3, "lookahead": 3}, "rewards": REWARDS}},
    "args": {"alignment": {"guide": {"name": "args", "top_k": 3}, "rewards": REWARDS}},
    "deal": {"alignment": {"guide": {"name": "deal", "top_k": 2, "lookahead": 3}, "rewards": REWARDS}},
    "logit_mix": {"alignment": {"guide": {"name": "logit_mix", "policies": [{"system": "You are a pirate."}]}}},
}
ASKED = ("Where can I eat fish?", "It rains. What now?", "Tell me a story about the harbour.")


def requests(tokens: int) -> list[tuple[str, dict[str, Any]]]:
    """(kind, body) of thirty requests, each with a seed of its own."""
    return [
        (
            kind,
            body
            | {
                "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
                "max_tokens": tokens,
                "seed": 100 + 10 * i + j,
                "return_token_ids": True,
            },
        )
        for i, (kind, body) in enumerate(KINDS.items())
        for j, question in enumerate(ASKED)
    ]


async def answer(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    """The tokens of a request's answer, if it asks for them, and its text."""
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    return f"{choice.get('token_ids')} {choice['message']['content']}"


async def answers(client: httpx.AsyncClient, bodies: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Answers to all requests in order: "alone" and "again" one by one, "beside" all at once and beside strangers."""
    alone = [await answer(client, body) for body in bodies]
    again = [await answer(client, body) for body in bodies]
    strangers = [
        {"messages": [{"role": "user", "content": f"Count to {i}."}], "max_tokens": 12 + i, "ignore_eos": True}
        for i in range(8)
    ]
    beside = await asyncio.gather(*(answer(client, body) for body in (*strangers, *bodies)))
    return {"alone": alone, "again": again, "beside": beside[len(strangers) :]}
