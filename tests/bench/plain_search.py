"""The published loop of Transfer Q* and DeAL on plain transformers, for bench_guides.py to compare with.

As in the authors' code (umd-huang-lab/Transfer-Q, direct.py), one answer at a time, for each of its tokens:
  1. a forward pass over prompt and answer so far, for the top k tokens: no keys and values are kept between tokens;
  2. the k candidates as one batch through `generate`, which keeps keys and values inside this call, for the lookahead;
  3. decoded, put into the reward model's own chat template, tokenized, scored as one padded batch;
  4. the token of the largest  log pi0 + weight * reward  is emitted.
DeAL with one beam is the same loop with a greedy lookahead. Work that could
slow it down without being part of the loop is left out: logits are computed only for the last position, rollouts end
where the answer must, nothing is printed.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class PlainAnswer:
    """An answer of exactly the requested number of tokens, and the seconds it took."""

    token_ids: list[int]
    seconds: float


class PlainSearch:
    """The policy and the reward model, each a transformers model in the dtype `auto`. Use it on one thread."""

    def __init__(self, policy: str, head: str, cache: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from guiderail.server.models.cpu_features import auto_dtype
        from guiderail.server.rewards.models.loading import head_card, load_model

        self.tokenizer = AutoTokenizer.from_pretrained(policy)
        self.policy = AutoModelForCausalLM.from_pretrained(policy, dtype=getattr(torch, auto_dtype())).eval()
        config = self.policy.generation_config
        config.eos_token_id, config.pad_token_id = None, self.tokenizer.pad_token_id or 0  # every answer has all tokens
        self._end = int(self.tokenizer.eos_token_id)
        reward = load_model(head, cache)
        self.reward_model, self.head, self.reward_tokenizer = reward.decoder.eval(), reward.heads, reward.tokenizer
        self.reward_tokenizer.padding_side = "right"
        self._longest = (head_card(head) or {})["max_tokens"]

    @torch.inference_mode()
    def answer(
        self,
        messages: Sequence[dict[str, str]],
        tokens: int,
        *,
        top_k: int,
        lookahead: int,
        weight: float = 1.0,
        sampled: bool,
        seed: int = 0,
    ) -> PlainAnswer:
        """An answer of `tokens` tokens, end-of-sequence left out as under ignore_eos."""
        torch.manual_seed(seed)
        started = time.perf_counter()
        prompt = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        ids = prompt
        for at in range(tokens):
            logits = self.policy(ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
            logits[self._end] = -torch.inf
            log_prior, top = torch.log_softmax(logits, -1).topk(top_k)
            candidates = torch.cat([ids.expand(top_k, -1), top[:, None]], 1)
            ahead = min(lookahead, tokens - at - 1)
            if ahead:
                candidates = self._roll_out(candidates, ahead, sampled=sampled)
            texts = self.tokenizer.batch_decode(candidates[:, prompt.shape[1] :], skip_special_tokens=True)
            score = log_prior + weight * self.rewards(messages, texts, whole=at + 1 + ahead == tokens)
            ids = torch.cat([ids, top[score.argmax()][None, None]], 1)
        return PlainAnswer(ids[0, prompt.shape[1] :].tolist(), time.perf_counter() - started)

    def _roll_out(self, candidates: Any, tokens: int, *, sampled: bool) -> Any:
        how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {"do_sample": False}
        mask = torch.ones_like(candidates)
        return self.policy.generate(candidates, attention_mask=mask, max_new_tokens=tokens, use_cache=True, **how)

    @torch.inference_mode()
    def rewards(self, messages: Sequence[dict[str, str]], answers: Sequence[str], *, whole: bool) -> Any:
        """Rewards [K] of answers, complete or not, as one padded batch in the reward model's template."""
        texts = []
        for answer in answers:
            turns, goes_on = [*messages, {"role": "assistant", "content": answer}], not whole and bool(answer.strip())
            text = self.reward_tokenizer.apply_chat_template(turns, tokenize=False, continue_final_message=goes_on)
            texts.append(text if goes_on else text.rstrip())  # the head was trained at the end of the turn
        self.reward_tokenizer.truncation_side = "left"
        batch = self.reward_tokenizer(
            texts,
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=self._longest,
            add_special_tokens=False,
        )
        hidden = self.reward_model(**batch, use_cache=False).last_hidden_state
        last = batch["attention_mask"].sum(1) - 1
        return hidden[torch.arange(len(answers)), last].float() @ self.head[0]
