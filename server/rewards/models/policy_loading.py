"""Loads two causal language models, policy and reference, and runs them for the reward `implicit` of models."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guiderail.guides.core.errors import GuiderailError
from guiderail.server.engines.engine_stats import RunnerStats
from guiderail.server.memory.shares import RewardShare
from guiderail.server.models import catalogue
from guiderail.server.models.model_fingerprint import fingerprint
from guiderail.server.rewards.likelihood_ratio import ImplicitOfModels, LanguageModel, LoadedPair
from guiderail.server.rewards.models.backend import scoring_thread
from guiderail.server.rewards.models.conversation_tokens import ConversationEncoder
from guiderail.server.rewards.models.model_resources import device_and_dtype, keep_to, pool_tokens
from guiderail.server.rewards.models.reward_spec import RewardModelSpec

PROBE = "Do both read this alike?\n\tdef f(x): return x ** 2  # <b>12 345</b> Überlänge"
ALIKE = 0.05  # relative difference of logits that rounding to bfloat16 stays below


@dataclass(frozen=True, slots=True)
class CausalModel:
    """A decoder with its last norm, the weight [V, H] of its LM head, the logits' soft-cap, and the tokenizer."""

    decoder: Any
    lm_head: Any
    softcap: float | None
    tokenizer: Any
    longest: int | None


def implicit_reward(
    spec: RewardModelSpec,
    reference: str,
    cache: Path,
    say: Callable[[str], None],
    share: RewardShare | None,
    *,
    plain_completions: bool = False,
) -> ImplicitOfModels:
    """Return the reward of a policy, the spec's path, and a reference; the models are loaded when it starts."""

    def load() -> LoadedPair:
        from guiderail.server.rewards.models.packed_decoder import token_bytes
        from guiderail.server.rewards.models.packed_logprobs import LogprobRunner, PackedPolicy

        keep_to(share)
        device, dtype = device_and_dtype(share.device if share is not None else None, spec.dtype)
        pair = [load_causal(path, cache, dtype, device, say) for path in (spec.path, reference)]
        _share_a_tokenizer(spec.path, reference, *(model.tokenizer for model in pair))
        say(f"policy {spec.path} and reference {reference} compute in {str(dtype).removeprefix('torch.')}")
        reads = min((each.longest for each in pair if each.longest is not None), default=None)
        both = sum(token_bytes(each.decoder) for each in pair)
        capacity = pool_tokens(spec, share, reads, both, say, on_cpu=device == "cpu")
        stats = RunnerStats()

        def running(model: CausalModel) -> LanguageModel:
            runner = LogprobRunner(model.decoder, model.lm_head, model.softcap, capacity=capacity)
            runner.warm_up()
            runner.stats = stats
            return PackedPolicy(
                runner,
                ConversationEncoder(model.tokenizer, at_end_of_turn=True, plain_completions=plain_completions),
            )

        return LoadedPair(running(pair[0]), running(pair[1]), min(reads or capacity, capacity), stats)

    return ImplicitOfModels(
        lambda: asyncio.get_running_loop().run_in_executor(scoring_thread(), load),
        lambda: "-".join(fingerprint(catalogue.resolve(path, cache)) for path in (spec.path, reference)),
    )


def _share_a_tokenizer(policy: str, reference: str, ours: Any, theirs: Any) -> None:
    """Raise GuiderailError for two tokenizers. One without a chat template gets that of the other."""
    if ours.get_vocab() != theirs.get_vocab() or ours(PROBE)["input_ids"] != theirs(PROBE)["input_ids"]:
        raise GuiderailError(f"policy {policy} and reference {reference} have different tokenizers")
    ours.chat_template = ours.chat_template or theirs.chat_template
    theirs.chat_template = theirs.chat_template or ours.chat_template


def load_causal(path: str, cache: Path, dtype: Any, device: str, say: Callable[[str], None]) -> CausalModel:
    """Load a language model in a dtype of torch. Raises GuiderailError if it has no LM head that is known."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    where = catalogue.resolve(path, cache, say)
    try:
        kinds = AutoConfig.from_pretrained(where).architectures or ["of a kind that its configuration does not say"]
        if not set(kinds) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
            raise GuiderailError(f"{path} has no LM head, it is {kinds[0]}; policy and reference must have one")
        model, found = AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise GuiderailError(f"language model {path} does not load: {error}") from error
    if lacking := sorted(found["missing_keys"]):
        raise GuiderailError(f"language model {path} lacks the weights {', '.join(lacking[:3])}")
    model = model.to(device).eval()
    text = model.config.get_text_config()
    softcap = getattr(text, "final_logit_softcapping", None)
    head = model.get_output_embeddings()
    lm_head = head.weight.detach()
    ids = torch.tensor([tokenizer(PROBE)["input_ids"]], device=device)
    with torch.inference_mode():
        theirs = model(input_ids=ids, use_cache=False).logits[0].float()
        ours = (model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0] @ lm_head.T).float()
        ours = softcap * torch.tanh(ours / softcap) if softcap else ours
    if getattr(head, "bias", None) is not None or not (theirs - ours).norm() <= ALIKE * theirs.norm():
        raise GuiderailError(f"{path}: {type(model).__name__} makes its logits in a way that is not known here")
    return CausalModel(model.base_model, lm_head, softcap, tokenizer, getattr(text, "max_position_embeddings", None))
