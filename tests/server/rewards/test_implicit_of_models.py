"""The implicit reward of two language models against transformers: both read the same answer, each after its own prompt."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_reward import TEMPLATE, WORDS, tiny_head, tiny_policy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PhiConfig,
    PhiForCausalLM,
)

from guiderail.guides.core.errors import GuiderailError, RequestError
from guiderail.guides.core.types import PROMPT, Answer, Message, ScoreGroup, TokenPrompt
from guiderail.server import placement
from guiderail.server.rewards.likelihood_ratio import ImplicitOfModels
from guiderail.server.rewards.models.loading import check_source, model_reward
from guiderail.server.rewards.models.reward_spec import RewardModelSpec, parse_flag

SERVICES: Any = None
ASK = (Message("system", "w9 w8"), Message("user", " ".join(WORDS[:30])))
ANSWERS = (
    Answer("w3 w4 w5"),
    Answer("w3 w4 w6 w7", partial=True),
    Answer("", partial=True),
    Answer("w3"),
    Answer("w1"),
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A Llama and a Gemma 2 (with a soft-cap of its logits and windows) over one tokenizer."""
    folder = tmp_path_factory.mktemp("pair")
    policy = tiny_policy(folder, "policy")
    other = {"kind": Gemma2ForCausalLM, "config": Gemma2Config, "sliding_window": 16, "final_logit_softcapping": 5.0}
    return policy, tiny_policy(folder, "reference", seed=1, **other)


async def started(policy: str, reference: str, **options: Any) -> Any:
    spec = RewardModelSpec(path=policy, reference=reference, dtype="float32", **options)
    reward = model_reward(spec, Path("/nonexistent"), print)
    await reward.start(SERVICES)
    return reward


def group(messages: tuple[Message, ...] = ASK, answers: tuple[Answer, ...] = ANSWERS, **params: Any) -> ScoreGroup:
    return ScoreGroup(messages, TokenPrompt((1,)), answers, ImplicitOfModels.Params(**params))


def logprobs(path: str, prompt: str, answer: str) -> list[float]:
    """By transformers, of all of the answer's tokens, from full logits in float64."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path).eval()
    before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
    with torch.no_grad():
        logits = model(torch.tensor([before + after])).logits[0].double()
    found = torch.log_softmax(logits, -1)[len(before) - 1 : -1]
    return [float(row[token]) for row, token in zip(found, after, strict=True)]


def expected(pair: tuple[str, str], prompt: str, answer: str, *, per_token: bool = False) -> float:
    up, down = (logprobs(path, prompt, answer) for path in pair)
    return (sum(up) - sum(down)) / (len(up) if per_token else 1)


def rendered(messages: tuple[Message, ...], answer: Answer) -> tuple[str, str]:
    """The template's words, written out: the prompt, and the answer with what ends its turn."""
    turns = "".join(f"<s> {m.role} {m.content} </s>\n" for m in messages)
    return f"{turns}<s> assistant ", answer.text if answer.partial else f"{answer.text} </s>"


async def test_it_is_the_ratio_of_full_log_softmaxes(pair: tuple[str, str]) -> None:
    """Whole and partial answers that share beginnings, two groups in one batch, one answer alone: all the same."""
    reward = await started(*pair)
    second = (Message("user", "w5 w6"),)
    first, other = await reward.score([group(), group(second, ANSWERS[:2], per_token=True, beta=0.1)])
    wanted = [expected(pair, *rendered(ASK, answer)) for answer in ANSWERS[:2]]
    assert first.values[:2] == pytest.approx(wanted, abs=1e-4)
    assert first.values[2] == 0.0
    mean = [0.1 * expected(pair, *rendered(second, answer), per_token=True) for answer in ANSWERS[:2]]
    assert other.values == pytest.approx(mean, abs=1e-4)
    for i, answer in enumerate(ANSWERS):
        (alone,) = await reward.score([group(answers=(answer,))])
        assert alone.values[0] == pytest.approx(first.values[i], abs=1e-4)
    assert len({round(value, 3) for value in first.values}) == len(ANSWERS)
    prompt = 3 * 3 + 2 + 30 - 1  # <s> role ... </s> twice and <s> assistant
    assert first.tokens == 2 * (5 * prompt + 4 + 4 + 0 + 2 + 2)
    assert reward.stats.tokens_asked > reward.stats.tokens_computed
    await reward.close()


async def test_a_partial_answer_s_value_grows_by_its_tokens(pair: tuple[str, str]) -> None:
    """The process form: chunk by chunk the sums add up to the whole answer's, its end apart."""
    reward = await started(*pair)
    words = WORDS[10:25]
    found = []
    for count in range(1, len(words) + 1):
        (result,) = await reward.score([group(answers=(Answer(" ".join(words[:count]), partial=True),))])
        found.append(result.values[0])
    prompt, _ = rendered(ASK, ANSWERS[0])
    up, down = (torch.tensor(logprobs(path, prompt, " ".join(words))) for path in pair)
    assert found == pytest.approx((up - down).cumsum(0).tolist(), abs=1e-4)
    await reward.close()


async def test_what_the_conversation_began_is_no_part_of_the_answer(pair: tuple[str, str]) -> None:
    reward = await started(*pair)
    begun = (*ASK, Message("assistant", "w3 w4 "))
    (result,) = await reward.score([group(begun, (Answer("w5"), Answer("w6", partial=True)))])
    prompt = rendered(ASK, ANSWERS[0])[0] + "w3 w4 "
    assert result.values == pytest.approx([expected(pair, prompt, "w5 </s>"), expected(pair, prompt, "w6")], abs=1e-4)
    raw = (Message(PROMPT, "w1 w2 "),)
    (result,) = await reward.score([group(raw, (Answer("w5 w6"),))])
    assert result.values[0] == pytest.approx(expected(pair, "w1 w2 ", "w5 w6"), abs=1e-4)
    await reward.close()


async def test_control_tokens_in_an_answer_are_text(pair: tuple[str, str]) -> None:
    """A fast tokenizer splits them; with this one they are words that it does not know, or those it does."""
    reward = await started(*pair)
    answers = (Answer("w1 <unk> w2"), Answer("w1 w2"))
    (result,) = await reward.score([group(answers=answers)])
    assert result.values[0] == pytest.approx(expected(pair, *rendered(ASK, answers[0])), abs=1e-4)
    await reward.close()


async def test_a_model_without_a_chat_template_reads_under_the_other_s(pair: tuple[str, str], tmp_path: Path) -> None:
    plain = tiny_policy(tmp_path, "plain", seed=2)
    tokenizer = AutoTokenizer.from_pretrained(plain)
    tokenizer.chat_template = None
    (Path(plain) / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(plain)
    assert AutoTokenizer.from_pretrained(plain).chat_template is None
    for both in ((pair[0], plain), (plain, pair[0])):
        reward = await started(*both)
        (result,) = await reward.score([group(answers=ANSWERS[:2])])
        wanted = [expected(both, *rendered(ASK, answer)) for answer in ANSWERS[:2]]
        assert result.values == pytest.approx(wanted, abs=1e-4)
        await reward.close()
    assert TEMPLATE


async def test_requests_that_cannot_be_scored_are_refused(pair: tuple[str, str]) -> None:
    reward = await started(*pair)
    with pytest.raises(RequestError, match="have 161 tokens; both models read 96"):
        await reward.score([group(answers=(Answer(" ".join([*WORDS, *WORDS[:40]])),))])
    with pytest.raises(RequestError, match="no token that the answer could go on from"):
        await reward.score([group((Message(PROMPT, ""),))])
    with pytest.raises(ValueError, match="greater than or equal to"):
        ImplicitOfModels.Params(beta=0)
    await reward.close()


async def test_revisions_tell_the_weights_apart(pair: tuple[str, str]) -> None:
    there, back = await started(*pair), await started(*reversed(pair))
    assert there.revision() != back.revision()
    (one,), (other,) = await there.score([group()]), await back.score([group()])
    assert one.values == pytest.approx([-value for value in other.values], abs=1e-4)


def classifier(folder: Path) -> str:
    return tiny_policy(folder, "other", kind=LlamaForSequenceClassification)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (classifier, "has no LM head, it is LlamaForSequenceClassification"),
        (lambda folder: tiny_policy(folder, "other", kind=LlamaModel), "has no LM head, it is LlamaModel"),
        (
            lambda folder: tiny_policy(folder, "other", kind=PhiForCausalLM, config=PhiConfig),
            "makes its logits in a way",
        ),
        (
            lambda folder: tiny_policy(
                folder, "other", kind=CohereForCausalLM, config=CohereConfig, logit_scale=0.0625
            ),
            "makes its logits in a way",
        ),
    ],
    ids=["a classifier", "a base model", "a bias", "scaled logits"],
)
async def test_a_model_without_an_lm_head_that_is_known_is_refused(
    make: Any, message: str, pair: tuple[str, str], tmp_path: Path
) -> None:
    other = make(tmp_path)
    for both in ((pair[0], other), (other, pair[0])):
        with pytest.raises(GuiderailError, match=f"{other}.*{message}"):
            await started(*both)


async def test_other_tokenizers_are_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    other = tiny_policy(tmp_path, "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["w1000"])
    tokenizer.save_pretrained(other)
    with pytest.raises(GuiderailError, match=f"policy {pair[0]} and reference {other} have different tokenizers"):
        await started(pair[0], other)


def test_what_is_no_language_model_is_refused_before_anything_starts(pair: tuple[str, str], tmp_path: Path) -> None:
    head = tiny_head(tmp_path)
    for both in ((pair[0], head), (head, pair[0])):
        spec = RewardModelSpec(path=both[0], reference=both[1])
        with pytest.raises(GuiderailError, match=f"--reward dpo: {head} is a reward head"):
            check_source("dpo", spec)
    with pytest.raises(GuiderailError, match=r"--reward dpo: nowhere: not an embedded model"):
        check_source("dpo", RewardModelSpec(path=pair[0], reference="nowhere"))
    check_source("dpo", RewardModelSpec(path=pair[0], reference=pair[1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("reference=p", "policy and reference are the same"),
        ("reference=r,head=1", "head does not go with reference"),
        ("reference=r,backend=vllm", "reference needs backend=packed"),
        ("reference=r,model=x", "model does not go with reference"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardModelSpec.model_validate(parse_flag(f"r=p,{options}")[1])


def test_the_plan_of_memory_counts_both(pair: tuple[str, str]) -> None:
    def need(**options: Any) -> Any:
        spec = RewardModelSpec(dtype="float32", **options)
        return placement.reward_need("r", spec, None, Path("/nonexistent"), print)

    both, policy, reference = need(path=pair[0], reference=pair[1]), need(path=pair[0]), need(path=pair[1])
    sizes = [sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(path).parameters()) * 4 for path in pair]
    assert both.weights == sum(sizes)
    assert both.kv_token == policy.kv_token + reference.kv_token
    assert both.longest == 96
    assert both.work == max(policy.work, reference.work)


async def test_with_less_memory_both_read_less(pair: tuple[str, str], tmp_path: Path) -> None:
    long = tiny_policy(tmp_path, "long", max_position_embeddings=30_000)
    other = tiny_policy(tmp_path, "other", seed=3, max_position_embeddings=20_000)
    reward = await started(long, other, kv_gb=2 / 1024)  # 2 MiB for 2 x 512 bytes a token
    assert reward._pair.longest == 2048
    await reward.close()
