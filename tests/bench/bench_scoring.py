"""Scoring with a reward model on CPU, every method in one run: `make bench-scoring`.

One reward model (SmolLM2-135M with a scalar head, in the dtype `auto`), prompts of 400 random tokens and 16 candidates
of 64, all new in every round. Rounds alternate over the methods; each time is the median over rounds.
"""

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH is set
from report import Target, write_section

from guiderail.server.models.cpu_features import auto_dtype, packs_bfloat16

DTYPE = getattr(torch, auto_dtype())
PROMPT, CANDIDATES, LENGTH, EXTENSION = 400, 16, 64, 8


def draw(count: int) -> list[int]:
    return [random.randrange(5, 49000) for _ in range(count)]


def model_folder(where: Path) -> str:
    """The base model with a random scalar head, as a sequence classifier."""
    from transformers import AutoModel, AutoTokenizer

    from guiderail.server.models import catalogue
    from guiderail.server.rewards.models.loading import LoadedModel, write_classifier
    from guiderail.server.settings import Settings

    base = catalogue.resolve(catalogue.DEFAULT_MODEL, Settings().cache)
    decoder = AutoModel.from_pretrained(base, dtype=DTYPE)
    head = torch.randn(1, decoder.config.hidden_size, generator=torch.Generator().manual_seed(0)) * 0.03
    write_classifier(LoadedModel(decoder, head, AutoTokenizer.from_pretrained(base), None), Path(base), where)
    return str(where)


def gemm_limit(rows: int) -> float:
    """Milliseconds of the model's matrix products alone, with weights packed where the runner packs them."""
    from guiderail.server.rewards.models.cpu_modules import PackedLinear

    def product(outputs: int, inputs: int) -> Any:
        if torch.bfloat16 == DTYPE and packs_bfloat16():
            return PackedLinear(torch.randn(outputs, inputs, dtype=DTYPE), None)
        return torch.nn.Linear(inputs, outputs, bias=False, dtype=DTYPE)

    shapes = [(576, 576), (192, 576), (192, 576), (576, 576), (3072, 576), (576, 1536)]
    layers = [[product(n, k) for n, k in shapes] for _ in range(30)]
    inputs = {k: torch.randn(rows, k, dtype=DTYPE) for k in (576, 1536)}
    started = time.perf_counter()
    with torch.inference_mode():
        for layer in layers:
            for linear in layer:
                linear(inputs[linear.in_features])
    return (time.perf_counter() - started) * 1e3


class Methods:
    """Every way to score, each a coroutine of one round that returns milliseconds."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoModelForSequenceClassification

        from guiderail.server.rewards.models.loading import load_model
        from guiderail.server.rewards.models.packed import PackedBackend, PackedRunner

        self.plain = AutoModelForSequenceClassification.from_pretrained(folder, dtype=DTYPE).eval()
        self.plain.config.pad_token_id = 2
        loaded = load_model(folder, Path("/nonexistent"))
        self.runner = PackedRunner(loaded.decoder, loaded.heads, capacity=32768)
        self.backend = PackedBackend(self.runner, 1)  # as in the server: one thread owns the runner
        self.vllm: Any = None

    async def start(self, folder: str) -> None:
        from guiderail.server.engines.vllm.engine_args import EngineSettings
        from guiderail.server.engines.vllm.pooling import build_pooling

        self.vllm = await build_pooling(EngineSettings(model=folder, max_model_len=2048, kv_cache_gb=2))

    def new(self) -> tuple[list[int], list[list[int]]]:
        prompt = draw(PROMPT)
        return prompt, [prompt + draw(LENGTH) for _ in range(CANDIDATES)]

    @torch.inference_mode()
    def padded(self, sequences: list[list[int]]) -> Any:
        longest = max(map(len, sequences))
        ids = torch.tensor([s + [2] * (longest - len(s)) for s in sequences])
        mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])
        return self.plain(ids, attention_mask=mask).logits[:, 0]

    async def transformers_padded(self) -> float:
        _, sequences = self.new()
        return await timed(lambda: apart(self.padded, sequences))

    async def transformers_one_by_one(self) -> float:
        _, sequences = self.new()
        return await timed(lambda: apart(lambda: [self.padded([s]) for s in sequences]))

    async def vllm_cold(self) -> float:
        _, sequences = self.new()
        return await timed(lambda: self.vllm.score(sequences))

    async def vllm_warm(self) -> float:
        prompt, sequences = self.new()
        await self.vllm.score([prompt])
        return await timed(lambda: self.vllm.score(sequences))

    async def vllm_extension(self) -> float:
        _, sequences = self.new()
        await self.vllm.score(sequences)
        longer = [s + draw(EXTENSION) for s in sequences]
        return await timed(lambda: self.vllm.score(longer))

    async def packed(self, before: list[list[int]], sequences: list[list[int]]) -> float:
        self.runner.clear()
        if before:
            await self.backend.score(before)
        return await timed(lambda: self.backend.score(sequences))

    async def packed_cold(self) -> float:
        return await self.packed([], self.new()[1])

    async def packed_warm(self) -> float:
        prompt, sequences = self.new()
        return await self.packed([prompt], sequences)

    async def packed_extension(self) -> float:
        _, sequences = self.new()
        return await self.packed(sequences, [s + draw(EXTENSION) for s in sequences])


async def apart(work: Callable[..., Any], *args: Any) -> Any:
    """Run torch work in the thread that does all of it in the server, too (see scoring_thread)."""
    from guiderail.server.rewards.models.backend import scoring_thread

    return await asyncio.get_running_loop().run_in_executor(scoring_thread(), work, *args)


async def timed(work: Callable[[], Awaitable[Any]]) -> float:
    started = time.perf_counter()
    await work()
    return (time.perf_counter() - started) * 1e3


async def main(rounds: int) -> None:
    random.seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = await apart(model_folder, Path(name) / "model")
        methods = await apart(Methods, folder)
        await methods.start(folder)
        _, sequences = methods.new()
        ours = (await apart(methods.runner.score, sequences))[:, 0]
        theirs = torch.tensor([value[0] for value in await methods.vllm.score(sequences)])
        plain = (await apart(methods.padded, sequences)).float()
        spread = plain.std().item()
        gaps = {"packed": (ours - plain).abs().max().item(), "vllm": (theirs - plain).abs().max().item()}
        names = [
            "transformers_padded", "transformers_one_by_one", "vllm_cold", "packed_cold", "vllm_warm", "packed_warm",
            "vllm_extension", "packed_extension",
        ]  # fmt: skip
        times: dict[str, list[float]] = {name: [] for name in names}
        times["gemm_limit_cold"] = []
        for number in range(rounds + 1):
            for each in names:
                await asyncio.sleep(1.2)  # vLLM's idle processes poll for a second after their last work
                value = await getattr(methods, each)()
                if number:
                    times[each].append(value)
            if number:
                times["gemm_limit_cold"].append(await apart(gemm_limit, PROMPT + CANDIDATES * LENGTH))
            print(f"round {number}: " + ", ".join(f"{k} {v[-1]:.0f}" for k, v in times.items() if v), file=sys.stderr)
        await methods.vllm.close()
    report(times, gaps, spread)


def report(times: dict[str, list[float]], gaps: dict[str, float], spread: float) -> None:
    median = {name: statistics.median(values) for name, values in times.items()}

    def ratio(slow: str, fast: str) -> tuple[float, float, float]:
        ratios = sorted(a / b for a, b in zip(times[slow], times[fast], strict=True))
        return statistics.median(ratios), ratios[0], ratios[-1]

    lines = [
        f"Prompt {PROMPT} + {CANDIDATES} candidates x {LENGTH} tokens, SmolLM2-135M with a scalar head, {auto_dtype()}. "
        "Medians over rounds; a ratio is the median of the ratios within rounds, with the smallest and largest.",
        "",
        "| method | ms |",
        "|---|---|",
        *(f"| {name.replace('_', ' ')} | {value:.0f} |" for name, value in median.items()),
        "",
        "| packed against | speed-up | range | target | |",
        "|---|---|---|---|---|",
    ]
    rows = [
        ("transformers padded", "transformers_padded", "packed_cold", 8.0),
        ("transformers one by one", "transformers_one_by_one", "packed_cold", None),
        ("vLLM pooling, cold", "vllm_cold", "packed_cold", 1.0),
        ("vLLM pooling, warm prompt", "vllm_warm", "packed_warm", 1.0),
        ("vLLM pooling, 8-token extension", "vllm_extension", "packed_extension", None),
    ]
    data: dict[str, Any] = {"ms": times, "max_difference_to_padded": gaps, "score_std": spread}
    targets = []
    for title, slow, fast, target in rows:
        middle, low, high = ratio(slow, fast)
        verdict = "" if target is None else "met" if middle >= target else "**missed**"
        if target is not None:
            measure = f"speed of packed scoring / {title}"
            targets.append(Target(measure, f">= {target:g}", f"{middle:.2f}", middle >= target))
        wanted = "" if target is None else f">= {target:g}"
        lines.append(f"| {title} | {middle:.2f} | {low:.2f}-{high:.2f} | {wanted} | {verdict} |")
        data[title] = {"ratio": middle, "target": target}
    share, low, high = ratio("gemm_limit_cold", "packed_cold")
    targets.append(
        Target("share of the matrix products' limit reached by packed", ">= 0.7", f"{share:.2f}", share >= 0.7)
    )
    lines += [
        f"| the matrix products' time alone (limit) | {share:.2f} of it reached | {low:.2f}-{high:.2f} | aim 0.7 "
        f"| {'reached' if share >= 0.7 else 'not reached'} |",
        "",
        f"Largest difference of a score to transformers' padded batch: packed {gaps['packed']:.3f}, "
        f"vLLM {gaps['vllm']:.3f}; the scores' standard deviation is {spread:.3f}.",
    ]
    write_section("scoring", "Scoring with a reward model on CPU", "make bench-scoring", lines, data, targets)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    asyncio.run(main(parser.parse_args().rounds))
