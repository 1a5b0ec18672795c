"""The vLLM engine as guiderail.guides.Engine: prompts in, sequences of deltas and log-probabilities out."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from guiderail.guides.core.errors import EngineUnavailable, RequestError
from guiderail.guides.core.interfaces import Rollouts
from guiderail.guides.core.types import SamplingSpec, TokenLogprob, TokenPrompt
from guiderail.server.engines.engine_stats import EngineStats
from guiderail.server.engines.policies import check_adapter
from guiderail.server.engines.process_monitor import ProcessMonitor
from guiderail.server.engines.sequences import EngineRollouts, EngineSequence, new_request_id, run_to_end
from guiderail.server.engines.vllm.batch_invariance import invariant_environment
from guiderail.server.engines.vllm.engine_args import EngineSettings, engine_args
from guiderail.server.engines.vllm.environment import prepare_environment
from guiderail.server.engines.vllm.launch import end, start
from guiderail.server.engines.vllm.mixture.lockstep import MixedSequence
from guiderail.server.engines.vllm.mixture.recipe import Recipe
from guiderail.server.engines.vllm.params import forced_params, next_token_params, sampling_params, sequence_priority
from guiderail.server.engines.vllm.request import VllmRequest

ASKED_AT_ONCE = 16  # sequences of one call for log-probabilities of answers, at least


async def build(settings: EngineSettings, say: Callable[[str], None] = lambda text: None) -> "VllmEngine":
    """Start the engine's processes, load and check the adapters, and run one warm-up request.

    Raises EngineUnavailable if it does not start and RequestError for a bad adapter (param is its name).
    """
    prepare_environment()
    stats = EngineStats()
    monitor = ProcessMonitor()
    llm = await asyncio.to_thread(_start, settings, stats, monitor, say)
    engine = VllmEngine(llm, settings, stats, monitor)
    say("warming the engine up")
    try:
        await engine.load_adapters()
        await llm.collective_rpc("leave_uncompiled")
        # The first log-probabilities load code, and compile a small kernel on a GPU; no user should wait for that.
        await engine.next_token_logprobs([TokenPrompt((0,))], top_k=1)
        await llm.collective_rpc("pad_steps")
        if settings.batch_invariant:
            faults = [layer for worker in await llm.collective_rpc("make_invariant") for layer in worker]
            if faults:
                raise EngineUnavailable(f"no batch invariance on this processor: {faults} depend on the batch")
        await llm.collective_rpc("settle")
    except BaseException as error:
        cause = None if engine.up else await engine.cause_of_death()
        await engine.close()
        if cause is not None:
            raise EngineUnavailable(f"vLLM does not start with {settings.model}: {cause}") from error
        raise
    return engine


def _start(settings: EngineSettings, stats: EngineStats, monitor: ProcessMonitor, say: Callable[[str], None]) -> Any:
    say("importing vLLM")
    from vllm.platforms import current_platform

    from guiderail.server.engines.vllm.stat_logger import Recorder

    mode = invariant_environment(cpu=current_platform.is_cpu()) if settings.batch_invariant else nullcontext()
    try:
        with mode:
            args = engine_args(settings)
            say("starting the engine's process, which loads the model")
            return start(args, monitor, [partial(Recorder, stats=stats)])
    except Exception as error:
        cause = str(error) or repr(error)  # some of vLLM's have no text
        raise EngineUnavailable(f"vLLM does not start with {settings.model}: {cause}") from error


class VllmEngine:
    """server.engines.served_engine.LocalEngine over one AsyncLLM. Use it on the event loop that built it."""

    def __init__(self, llm: Any, settings: EngineSettings, stats: EngineStats, monitor: ProcessMonitor) -> None:
        self.stats = stats
        self._monitor = monitor
        self._llm = llm
        self._settings = settings
        self._lora: dict[str, Any] = {}
        self._asked = 0  # calls of answer_logprobs that run now
        self._asked_at_once = (settings.max_num_seqs or 0) // 4  # sequences that they share
        self.max_model_len: int = llm.model_config.max_model_len
        self.vocab_size: int = llm.model_config.get_vocab_size()
        self.max_logprobs = settings.max_logprobs
        self.dtype = str(llm.model_config.dtype).removeprefix("torch.")

    @property
    def up(self) -> bool:
        """True until the engine's processes are gone."""
        return self._llm is not None and not self._llm.errored

    async def cause_of_death(self) -> str:
        """Return why the engine's processes ended, in one line. May take some seconds."""
        return await self._monitor.cause()

    def num_running(self) -> int:
        """Sequences that the engine has not finished, running and waiting."""
        return 0 if self._llm is None else int(self._llm.get_num_unfinished_requests())

    async def load_adapters(self) -> None:
        """Load every adapter now: a bad one raises here, where inside generate it would kill the engine."""
        from vllm.lora.request import LoRARequest

        for number, (name, path) in enumerate(self._settings.adapters, start=1):
            check_adapter(name, path, self._settings.max_lora_rank)
            request = LoRARequest(name, number, path)
            try:
                await self._llm.add_lora(request)
            except Exception as error:
                raise RequestError(f"LoRA adapter '{name}' at {path} does not load: {error}", name) from error
            self._lora[name] = request

    def generate(
        self,
        prompts: Sequence[TokenPrompt],
        sampling: SamplingSpec,
        *,
        seeds: Sequence[int | None] | None = None,
        deadline: float | None = None,
    ) -> Rollouts:
        sequences: list[EngineSequence] = []
        for index, (prompt, seed) in enumerate(zip(prompts, seeds or [sampling.seed] * len(prompts), strict=True)):
            if prompt.plausibility or any(m.weight for m in prompt.mix):
                sequences.append(self._mixed(index, prompt, sampling, seed))
            else:
                params = sampling_params(sampling, seed, wide=len(prompts) > 1)
                sequences.append(self._request(index, prompt, params))
        return EngineRollouts(sequences, deadline, self._free)

    async def _free(self, ids: Sequence[str]) -> None:
        if self.up:
            await self._llm.abort(list(ids))

    async def answer(self) -> None:
        """Return once the engine's process has answered a question that costs it nothing. Raises if it cannot."""
        await self._llm.is_sleeping()

    def _request(
        self, index: int, prompt: TokenPrompt, params: Any, request_id: str = "", priority: int | None = None
    ) -> VllmRequest:
        return VllmRequest(
            self._llm,
            self._monitor,
            request_id or new_request_id(),
            prompt.token_ids,
            params,
            index=index,
            lora=None if prompt.adapter is None else self._lora[prompt.adapter],
            priority=sequence_priority(params, index) if priority is None else priority,
        )

    def _mixed(self, index: int, prompt: TokenPrompt, sampling: SamplingSpec, seed: int | None) -> MixedSequence:
        def member(prompt: TokenPrompt, spec: SamplingSpec, recipe: Recipe) -> VllmRequest:
            params = sampling_params(spec, None, recipe.extra_args())
            params.detokenize = recipe.role == 0  # the answer's text is the first member's
            return self._request(index, prompt, params, f"{recipe.group}.{recipe.role}")

        return MixedSequence(index, prompt, sampling, seed, self.max_model_len, member, new_request_id())

    async def next_token_logprobs(self, prompts: Sequence[TokenPrompt], top_k: int) -> list[dict[int, float]]:
        params = next_token_params(top_k)
        found = await self._logprobs([(prompt, params) for prompt in prompts], len(prompts))
        return [dict(tokens[0].top) for tokens in found]

    async def answer_logprobs(
        self, prompts: Sequence[TokenPrompt], answers: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        v2 = self._llm.vllm_config.use_v2_model_runner
        # The answers are decoded again with every token forced: that uses the prefix cache, where vLLM's
        # prompt_logprobs bypass it (3 times slower on CPU) and kill an engine that has LoRA adapters.
        # logprob_token_ids would do for single tokens, but spoils the top_logprobs of other sequences in the batch.
        asked = ((p, forced_params(answer, v2)) for p, answer in zip(prompts, answers, strict=True))
        # Thousands of answers neither fill vLLM's queue, through which each abort goes, nor keep other calls waiting.
        self._asked += 1
        try:
            found = await self._logprobs(asked, max(ASKED_AT_ONCE, self._asked_at_once // self._asked))
        finally:
            self._asked -= 1
        return [
            [dict(entry.top)[token] for entry, token in zip(tokens, answer, strict=True)]
            for tokens, answer in zip(found, answers, strict=True)
        ]

    async def _logprobs(self, asked: Iterable[tuple[TokenPrompt, Any]], at_once: int) -> list[tuple[TokenLogprob, ...]]:
        """Run a request with each prompt and parameters to its end; return the log-probabilities of its tokens."""
        last = await run_to_end(map(self._question, asked), at_once, self._free)
        return [delta.logprobs or () for delta in last]

    def _question(self, asked: tuple[TokenPrompt, Any]) -> VllmRequest:
        prompt, params = asked
        if prompt.mix:
            raise RequestError("log-probabilities under a mixture of policies are not available")
        return self._request(0, prompt, params, priority=1)  # not 0, a plain chat's: nobody looks at one of these

    async def close(self) -> None:
        """End the engine's processes. Takes some seconds."""
        if self._llm is not None:
            llm, self._llm = self._llm, None
            await end(llm)
