"""The vLLM engine: every import of vLLM's internals is in this module (tests/test_layout.py).

`build` starts an AsyncLLM with the settings that were measured to matter on CPU (32-token KV pages,
all cores for the worker of a small machine). Each row of a generation is one vLLM request of its own,
so that a row can be dropped alone; prefixes are shared by vLLM's cache.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, nullcontext
from functools import partial
from typing import Any

from guiderail.guides.core.errors import EngineUnavailable, RequestError
from guiderail.guides.core.guide import Rollouts
from guiderail.guides.core.types import Delta, SamplingSpec, TokenPrompt
from guiderail.server.engines.engine_stats import EngineStats
from guiderail.server.engines.lora import check_adapter
from guiderail.server.engines.process_monitor import ProcessMonitor
from guiderail.server.engines.sequences import EngineRollouts, new_request_id
from guiderail.server.engines.vllm.batch_invariance import environment as invariant_environment
from guiderail.server.engines.vllm.launch import EngineSettings, engine_args, prepare_environment, start
from guiderail.server.engines.vllm.mixture.driver import MixedRow, MixedSampling, Recipe
from guiderail.server.engines.vllm.params import forced_params, refusal, row_priority, sampling_params, token_logprobs

__all__ = ["EngineSettings", "VllmEngine", "build", "end", "prepare_environment"]


async def build(settings: EngineSettings, say: Callable[[str], None] = lambda text: None) -> "VllmEngine":
    """Starts the engine's processes, loads and checks the adapters, and runs one warm-up request.

    Raises EngineUnavailable when it does not start and RequestError for a bad adapter (param is its name).
    """
    prepare_environment()
    stats = EngineStats()
    words = ProcessMonitor()
    llm = await asyncio.to_thread(_start, settings, stats, words, say)
    engine = VllmEngine(llm, settings, stats, words)
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
        cause = await engine.cause_of_death() if engine.dead else None
        await engine.close()
        if cause is not None:
            raise EngineUnavailable(f"vLLM does not start with {settings.model}: {cause}") from error
        raise
    return engine


def _start(settings: EngineSettings, stats: EngineStats, words: ProcessMonitor, say: Callable[[str], None]) -> Any:
    say("importing vLLM")
    from vllm.platforms import current_platform

    from guiderail.server.engines.vllm.stat_logger import Recorder

    mode = invariant_environment(cpu=current_platform.is_cpu()) if settings.batch_invariant else nullcontext()
    try:
        with mode:
            args = engine_args(settings)
            say("starting the engine's process, which loads the model")
            return start(args, words, [partial(Recorder, stats=stats)])
    except Exception as error:
        cause = str(error) or repr(error)  # some of vLLM's have no text
        raise EngineUnavailable(f"vLLM does not start with {settings.model}: {cause}") from error


async def end(llm: Any) -> None:
    """Ends an AsyncLLM and its processes. Takes some seconds."""
    if llm.output_handler is not None:  # else it reports the end we are making as a death
        llm.output_handler.cancel()
    await asyncio.to_thread(llm.shutdown, 5)
    # Its __del__ calls shutdown once more, at the interpreter's exit when what it needs is gone.
    llm.shutdown = lambda timeout=None: None


class VllmEngine:
    """guiderail.guides.Engine over one AsyncLLM. Use it on the event loop that built it."""

    def __init__(self, llm: Any, settings: EngineSettings, stats: EngineStats, words: ProcessMonitor) -> None:
        self.stats = stats
        self._words = words
        self._llm = llm
        self._settings = settings
        self._lora: dict[str, Any] = {}
        self._mixed: dict[str, MixedRow] = {}  # by request id
        self.max_model_len: int = llm.model_config.max_model_len
        self.vocab_size: int = llm.model_config.get_vocab_size()
        self.max_logprobs = settings.max_logprobs
        self.dtype = str(llm.model_config.dtype).removeprefix("torch.")

    @property
    def dead(self) -> bool:
        """Whether the engine's processes are gone."""
        return self._llm is None or bool(self._llm.errored)

    async def cause_of_death(self) -> str:
        """Why the engine's processes ended, in one line. May take some seconds."""
        return await self._words.tell()

    def num_running(self) -> int:
        """Rows the engine has not finished: running and waiting."""
        return 0 if self._llm is None else int(self._llm.get_num_unfinished_requests())

    async def load_adapters(self) -> None:
        """Loads every adapter now: a bad one raises here, where inside generate it would kill the engine."""
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
        wide = len(prompts) > 1
        params = [
            MixedSampling(sampling, seed)
            if prompt.plausibility or any(m.weight for m in prompt.mix)
            else sampling_params(sampling, seed, wide=wide)
            for prompt, seed in zip(prompts, seeds or [sampling.seed] * len(prompts), strict=True)
        ]
        return EngineRollouts(self, prompts, params, deadline)

    async def next_token_logprobs(self, prompts: Sequence[TokenPrompt], top_k: int) -> list[dict[int, float]]:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0, logprobs=top_k, detokenize=False)
        outputs = await asyncio.gather(*(self._one(prompt, params) for prompt in prompts))
        return [{token: entry.logprob for token, entry in output.logprobs[0].items()} for output in outputs]

    async def answer_logprobs(
        self, prompts: Sequence[TokenPrompt], answers: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        v2 = self._llm.vllm_config.use_v2_model_runner
        # The answers are decoded again with every token forced: that uses the prefix cache, where vLLM's
        # prompt_logprobs bypass it (3 times slower on CPU) and kill an engine that has LoRA adapters.
        # logprob_token_ids would do for single tokens, but spoils the top_logprobs of other rows in the batch.
        outputs = await asyncio.gather(
            *(self._one(p, forced_params(answer, v2)) for p, answer in zip(prompts, answers, strict=True))
        )
        return [
            [row[token].logprob for row, token in zip(output.logprobs, answer, strict=True)]
            for output, answer in zip(outputs, answers, strict=True)
        ]

    async def _one(self, prompt: TokenPrompt, params: Any) -> Any:
        """Runs one request to its end and returns its completion, with all its tokens."""
        if prompt.mix:
            raise RequestError("log-probabilities under a mixture of policies are not available")
        last = None
        # Not 0, a plain chat's priority: nobody looks at a single one of these.
        async with aclosing(self.stream(prompt, params, new_request_id(), 1)) as outputs:
            async for output in outputs:
                last = output
        if last is None:
            raise EngineUnavailable("the engine returned nothing")
        return last.outputs[0]

    async def stream(
        self, prompt: TokenPrompt, params: Any, request_id: str, priority: int = 0
    ) -> AsyncGenerator[Any, None]:
        """vLLM's outputs for one request, its errors turned into ours."""
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        lora = self._lora[prompt.adapter] if prompt.adapter is not None else None
        try:
            async for output in self._llm.generate(
                tokens_input(list(prompt.token_ids)), params, request_id, lora_request=lora, priority=priority
            ):
                yield output
        except EngineDeadError as error:
            raise EngineUnavailable(f"the engine process died: {await self.cause_of_death()}") from error
        except EngineGenerateError as error:
            cause = error.__cause__
            if isinstance(cause, ValueError):  # vLLM wraps late validation in this
                raise refusal(cause, params) from error
            raise EngineUnavailable(f"the engine failed: {cause!r}") from error
        except (VLLMClientError, ValueError) as error:
            raise refusal(error, params) from error

    async def deltas(self, row: int, prompt: TokenPrompt, params: Any, request_id: str) -> AsyncGenerator[Delta, None]:
        """One request's outputs as deltas of `row`. An aborted one ends with finish reason "abort"."""
        if isinstance(params, MixedSampling):
            mixed = self._mixed[request_id] = MixedRow(self, row, prompt, params, request_id)
            try:
                async with aclosing(mixed.deltas()) as deltas:
                    async for delta in deltas:
                        yield delta
            finally:
                del self._mixed[request_id]
            return
        async with aclosing(self.stream(prompt, params, request_id, row_priority(params, row))) as outputs:
            async for output in outputs:
                completion = output.outputs[0]
                logprobs = token_logprobs(completion) if params.logprobs is not None else None
                yield Delta(
                    row,
                    completion.text,
                    tuple(completion.token_ids),
                    completion.finish_reason,
                    completion.stop_reason,
                    logprobs,
                )

    def member_deltas(
        self, row: int, prompt: TokenPrompt, spec: SamplingSpec, recipe: Recipe, request_id: str
    ) -> AsyncGenerator[Delta, None]:
        """The deltas of one row of a mixture; only the first row's have text."""
        params = sampling_params(spec, None, recipe.extra_args())
        params.detokenize = recipe.role == 0
        return self.deltas(row, prompt, params, request_id)

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Frees the engine work of these requests."""
        mixed = [self._mixed[each] for each in request_ids if each in self._mixed]
        members = [member for row in mixed for member in row.abandon()]
        if not self.dead:
            await self._llm.abort([*(each for each in request_ids if each not in self._mixed), *members])

    async def close(self) -> None:
        """Ends the engine's processes. Takes some seconds."""
        if self._llm is not None:
            llm, self._llm = self._llm, None
            await end(llm)
