"""Log-probabilities of answers by the packed runner against transformers' log-softmax of full logits, for six decoders."""

import copy
import itertools
import math
import random
from typing import Any

import pytest
import torch
from tiny_configs import CONFIGS
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from guiderail.kernels.token_logprobs import _torch_path
from guiderail.server.rewards.models.backend import Text
from guiderail.server.rewards.models.packed_logprobs import LogprobRunner


def build(name: str, dtype: Any = torch.float32, capacity: int = 2000, **options: int) -> tuple[LogprobRunner, Any]:
    """A runner, and transformers' log-probabilities of one text's answer in float32."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation="eager").eval()
    for parameter in plain.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    twin = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=dtype)
    twin.load_state_dict(plain.state_dict())
    twin = twin.to(dtype)
    softcap = getattr(CONFIGS[name], "final_logit_softcapping", None)
    weight = twin.get_output_embeddings().weight.detach()
    runner = LogprobRunner(twin.base_model, weight, softcap, capacity=capacity, **options)

    def one(text: Text) -> Any:
        tokens, start = text
        with torch.no_grad():
            found = torch.log_softmax(plain(torch.tensor([tokens])).logits[0].double(), -1)
        return found[torch.arange(start - 1, len(tokens) - 1), torch.tensor(tokens)[start:]]

    return runner, one


def tokens(count: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(97) for _ in range(count)]


def error(runner: LogprobRunner, one: Any, texts: list[Text]) -> float:
    worst = 0.0
    for got, text in zip(runner.logprobs(texts), texts, strict=True):
        assert len(got) == len(text[0]) - text[1]
        if len(got):
            worst = max(worst, (torch.tensor(got) - one(text)).abs().max().item())
    return worst


@pytest.mark.parametrize("name", list(CONFIGS))
def test_it_is_the_log_softmax_of_full_logits(name: str) -> None:
    """Answers of unequal lengths to two prompts, then longer ones over kept prefixes, then rollouts of those."""
    runner, one = build(name)
    prompts = [tokens(40, 1), tokens(7, 2)]
    texts = [(p + tokens(n, n), len(p)) for p, n in itertools.product(prompts, (1, 17, 5, 33))]
    assert error(runner, one, texts) < 1e-4
    longer = [(t + tokens(n, 50 + n), s) for (t, s), n in zip(texts, (3, 1, 8, 2, 9, 4, 1, 6), strict=True)]
    computed = runner.stats.tokens_computed
    assert error(runner, one, longer) < 1e-4
    assert runner.stats.tokens_computed - computed == 34 + 8  # the new tokens, and the one before those of each
    rollouts = [(t + tokens(4, 90 + i), s) for t, s in longer[:3] for i in range(3)]
    assert error(runner, one, rollouts) < 1e-4
    assert error(runner, one, texts) < 1e-4


def test_the_control_differs() -> None:
    runner, one = build("llama")
    prompt = tokens(40, 1)
    (got,) = runner.logprobs([([*prompt, 3, 4], 40)])
    assert (torch.tensor(got) - one(([*tokens(40, 2), 3, 4], 40))).abs().max() > 0.1


def test_again_it_costs_nothing_and_another_beginning_of_the_answer_what_it_lacks() -> None:
    runner, one = build("llama")
    text = tokens(30, 1)
    (first,) = runner.logprobs([(text, 20)])
    computed = runner.stats.tokens_computed
    assert [each.tolist() for each in runner.logprobs([(text, 20), (text, 20), (text[:25], 22)])] == [
        first.tolist(), first.tolist(), first[2:5].tolist(),
    ]  # fmt: skip
    assert runner.stats.tokens_computed == computed
    assert error(runner, one, [(text, 10), (text[:15], 5), (text, 20), (text, 1)]) < 1e-4
    assert error(runner, one, [(text, 30), (text[:3], 3)]) == 0.0


def test_eviction_keeps_values_right() -> None:
    runner, one = build("llama", capacity=128)
    for seed in range(12):
        prompt = tokens(30, seed % 3)
        assert error(runner, one, [(prompt + tokens(n, seed * 10 + n), 30) for n in (2, 9, 20)]) < 1e-4
        assert runner.cached_tokens <= 128


@pytest.mark.parametrize("name", ["llama", "gemma2 with soft-cap and window"])
def test_a_text_longer_than_a_pass_is_read_in_several(name: str) -> None:
    """With the answer's start in the first of them, in a later one, and where most of it is known."""
    runner, one = build(name, capacity=200, max_pass_tokens=32)
    long = tokens(200, 1)
    for start in (5, 32, 33, 150, 199):
        runner.clear()
        assert error(runner, one, [(tokens(5, 2), 2), (long, start), (tokens(7, 3), 6)]) < 1e-4
    assert error(runner, one, [(long, 3)]) < 1e-4
    assert error(runner, one, [(long[:100] + tokens(n, n), 90) for n in (3, 40, 90)]) < 1e-4


def test_answers_that_go_on_from_one_that_passes() -> None:
    runner, one = build("llama", capacity=32, max_pass_tokens=200)
    prompt = tokens(20, 1)
    long = prompt + tokens(12, 2)
    texts = [long, prompt + tokens(11, 3), prompt + tokens(11, 3), (prompt + tokens(11, 3))[:25]]
    texts += [prompt + tokens(10, 3 + i) for i in range(6)] + [prompt + tokens(9, 5) + [1, 2], long]
    for start in (20, 3, 24):
        assert error(runner, one, [(text, start) for text in texts]) < 1e-4
        assert error(runner, one, [(text, start) for text in reversed(texts)]) < 1e-4
    assert runner.cached_tokens <= 32


def test_random_texts_in_random_batches() -> None:
    """Few different tokens, so that texts share beginnings that nobody planned."""
    draw = random.Random(5)
    runner, one = build("llama", capacity=60, max_pass_tokens=40)
    for _ in range(25):
        texts = []
        for _ in range(draw.randrange(1, 7)):
            text = [draw.randrange(2) for _ in range(draw.randrange(2, 30))]
            texts.append((text, draw.randrange(1, len(text) + 1)))
        assert error(runner, one, texts) < 1e-4


def test_a_failing_pass_leaves_the_cache_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, one = build("llama")
    prompt = tokens(30, 1)
    runner.logprobs([([*prompt, 1], 30)])
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_forward", lambda *a: (_ for _ in ()).throw(RuntimeError("no memory")))
        with pytest.raises(RuntimeError, match="no memory"):
            runner.logprobs([([*prompt, 2, 3], 30)])
    assert error(runner, one, [([*prompt, 2, 3], 30), ([*prompt, 1], 30)]) < 1e-4


def test_what_is_not_finite_is_no_endless_question() -> None:
    runner, _ = build("llama", max_pass_tokens=4)
    runner._lm_head = torch.full_like(runner._lm_head, math.nan)
    for _ in range(2):
        (got,) = runner.logprobs([(tokens(12, 1), 3)])
        assert (got == -math.inf).all()


def test_bfloat16_is_near_float32() -> None:
    runner, one = build("llama", torch.bfloat16)
    texts = [(tokens(40, 1) + tokens(n, n), 40) for n in (1, 5, 20)]
    assert error(runner, one, texts) < 0.2


@pytest.mark.parametrize(
    ("text", "message"),
    [(([], 1), "1 to 64"), (([1] * 65, 1), "1 to 64"), (([1, 2], 0), "behind at least one token")],
    ids=["empty", "too long", "no prompt"],
)
def test_texts_that_cannot_be_scored_are_refused(text: Text, message: str) -> None:
    runner, _ = build("llama", capacity=64)
    with pytest.raises(ValueError, match=message):
        runner.logprobs([text])


def test_no_matrix_of_tokens_by_vocabulary_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 61 rows (one stands for none) and 97 tokens, where no chunk of the vocabulary takes them all."""
    runner, _ = build("llama")
    monkeypatch.setitem(_torch_path.__globals__, "CHUNK_ELEMENTS", 61 * 20)
    widest = 0

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal widest
            made = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ in ("mm", "matmul") and made.shape[0] == 61:
                widest = max(widest, made.shape[1])
            return made

    with Shapes():
        runner.logprobs([(tokens(100, 1), 40)])
    assert widest == 20


@pytest.mark.parametrize("name", ["llama", "gemma2 with soft-cap and window"])
def test_warming_up_compiles_all_that_scoring_launches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from launches import recorded, warmed_up

    runner, _ = build(name)
    with recorded(monkeypatch) as launches:
        warm = warmed_up(runner, launches)
        prompt = tokens(40, 1)
        for count in (1, 5, 15, 16, 17, 40, 80, 300):
            runner.logprobs([(prompt + tokens(count, count), 40), (prompt + tokens(3, count), 40)])
        assert set(launches) - warm == set()
