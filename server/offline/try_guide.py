"""Run a guide of a file on one prompt, and print its candidates, their scores and the answer. No server is started.

The policy is a script by default: short sentences at random, written at once, the same ones for a seed. With
`--engine embedded` it is the served model, as for `guiderail serve`. The guide's rewards may be in its file too.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from guiderail.guides.core.errors import GuiderailError
from guiderail.server.offline.options import NamedReward, add_engine_arguments

if TYPE_CHECKING:
    from guiderail.guides.core.context import Context
    from guiderail.guides.core.guide import Guide
    from guiderail.guides.core.interfaces import Engine, Renderer
    from guiderail.guides.core.reward import Reward
    from guiderail.guides.core.types import Candidate, Final
    from guiderail.guides.scoring.pipeline import Scorers
    from guiderail.server.offline.guide_file import GuideFile
    from guiderail.server.state import ServerState

SHOWN = 60  # characters of a candidate's text


@dataclass(frozen=True, slots=True)
class Parts:
    """The engine, its renderer and model's name, and the rewards, with what scores by them."""

    engine: "Engine"
    renderer: "Renderer"
    rewards: "Mapping[str, Reward]"
    scorers: "Scorers"
    model_name: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("file", metavar="GUIDE.py", help="file with a subclass of guiderail.guides.Guide")
    add("prompt", help="the user's message")
    add("--guide", metavar="CLASS", help="the guide's class, where the file has several")
    add("--params", default="{}", metavar="JSON", help='the guide\'s parameters, as in {"n": 8}')
    add(
        "--rewards", nargs="+", metavar="REWARD",
        help='a reward\'s name, or an entry of "rewards" as JSON; rewards of the file go by the names of their classes '
        "(length, if the guide needs a reward)",
    )  # fmt: skip
    add("--select", default="argmax", metavar="RULE", help="a selection rule's name, or JSON (argmax)")
    add("--engine", choices=("scripted", "embedded"), default="scripted", help="what writes the answers (scripted)")
    add("--max-tokens", type=int, default=32, help="maximum number of tokens in an answer (32)")
    add("--temperature", type=float, default=1.0, help="sampling temperature (1)")
    add("--seed", type=int, default=0, help="seed of the answers (0)")
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit status. Raises GuiderailError, which names the line for a guide's own fault."""
    from guiderail.server.offline.guide_file import read_guide

    file = read_guide(Path(args.file), args.guide)
    if args.engine == "embedded":
        return _embedded(args, file)
    import asyncio

    return asyncio.run(_scripted(args, file))


async def _scripted(args: argparse.Namespace, file: "GuideFile") -> int:
    from guiderail.guides.core.interfaces import Services
    from guiderail.guides.core.registry import load_rewards
    from guiderail.guides.scoring.pipeline import Scorers
    from guiderail.server.metrics import Metrics
    from guiderail.server.offline.scripted_policy import ScriptedPolicy, ScriptedRenderer
    from guiderail.server.rewards.models.sentence_embedder import SentenceEmbedder
    from guiderail.server.rewards.pairwise_judge import ServedJudge
    from guiderail.server.scoring.batcher import BatchingScorer
    from guiderail.server.scoring.calibrator import Calibrator

    renderer = ScriptedRenderer()
    engine, metrics = ScriptedPolicy(renderer), Metrics("scripted")
    services = Services(engine, renderer)
    installed = {str(spec["name"]) for spec in _specs(args, file)} - file.rewards.keys()
    rewards = {name: cls() for name, cls in {**load_rewards(installed), **file.rewards}.items()}
    for reward in rewards.values():
        await reward.start(services)
    scorer = BatchingScorer(rewards, metrics)
    scorers = Scorers(
        scorer, Calibrator((), metrics), SentenceEmbedder(None, "cpu"), ServedJudge(services, max_tokens=lambda: 512)
    )
    try:
        return await _try(args, file, Parts(engine, renderer, rewards, scorers))
    finally:
        for reward in rewards.values():
            await reward.close()


def _embedded(args: argparse.Namespace, file: "GuideFile") -> int:
    from dataclasses import replace

    from guiderail.server.offline.offline_state import run_offline
    from guiderail.server.offline.options import settings_for
    from guiderail.server.scoring.batcher import BatchingScorer

    installed = [NamedReward(spec) for spec in _specs(args, file) if spec["name"] not in file.rewards]

    async def main(state: "ServerState") -> int:
        rewards = {**state.rewards, **{name: cls() for name, cls in file.rewards.items()}}
        scorers = replace(state.scorers, scorer=BatchingScorer(rewards, state.metrics))
        parts = Parts(state.engine, state.renderer, rewards, scorers, state.settings.model_name)
        return await _try(args, file, parts)

    return run_offline(settings_for(args, installed), main)


async def _try(args: argparse.Namespace, file: "GuideFile", parts: Parts) -> int:
    from guiderail.guides.core.context import Context
    from guiderail.guides.core.dialogue import Dialogue
    from guiderail.guides.core.interfaces import Services
    from guiderail.guides.core.metering import Limits, Spend
    from guiderail.guides.core.types import Message, SamplingSpec, Scored, Token
    from guiderail.guides.prompters import Template
    from guiderail.guides.sampling import Sampling
    from guiderail.guides.scoring.pipeline import Judging
    from guiderail.server.offline.guide_file import place_of
    from guiderail.server.openai_errors import ApiError
    from guiderail.server.requests.contract import Contract
    from guiderail.server.requests.resolve import Resolver
    from guiderail.server.requests.specs import read_alignment
    from guiderail.server.settings import OperatorLimits

    name = file.guide.__name__
    services = Services(parts.engine, parts.renderer, model_name=parts.model_name)
    guides: dict[str, type[Guide]] = {"sampling": Sampling, name: file.guide}
    asked = {
        "guide": {"name": name, **_json_object(args.params, "--params")},
        "rewards": _specs(args, file),
        "select": json.loads(args.select) if args.select.lstrip().startswith("{") else args.select,
    }
    try:
        resolver = Resolver(guides, parts.rewards, services, {}, {}, OperatorLimits())
        alignment = resolver.resolve(read_alignment(asked))
    except ApiError as error:
        raise GuiderailError(f"{file.path}: {error}") from error
    messages = (Message("user", args.prompt),)
    sampling = SamplingSpec(args.max_tokens, args.temperature, seed=args.seed)
    dialogue = Dialogue(
        messages, Template().render(messages, parts.renderer), sampling, parts.renderer, parts.model_name
    )
    judging = Judging(alignment.rewards, alignment.combine, alignment.selection, alignment.calibration)
    ctx = Context.of(
        dialogue, judging, parts.engine, parts.scorers, limits=Limits(), spend=Spend(), request="try-guide"
    )
    contract, said = Contract(name), ""
    scored: list[tuple[Candidate, ...]] = []  # by step
    try:
        async with ctx, contract.events(alignment.guide, ctx) as events:
            async for event in events:
                if contract.holds_back(event):
                    continue
                if isinstance(event, Token):
                    said += event.text
                    ctx.spend.tokens_accepted += len(event.token_ids)
                elif isinstance(event, Scored):
                    scored.append(event.candidates)
        final = contract.final()
    except (GuiderailError, ApiError) as error:
        raise GuiderailError(f"{place_of(error, file)}: {error}") from error
    for number, candidates in enumerate(scored):
        if candidates != final.candidates:
            print(f"scored {number + 1}")
            _print_candidates(candidates)
    _print_answer(ctx, final, said)
    return 0


def _specs(args: argparse.Namespace, file: "GuideFile") -> list[dict[str, object]]:
    """The entries of the alignment object's "rewards"."""
    if args.rewards is None:
        return [{"name": "length"}] if file.guide.steers and file.guide.needs_rewards else []
    specs: list[dict[str, object]] = []
    for text in args.rewards:
        spec = _json_object(text, "--rewards") if text.lstrip().startswith("{") else {"name": text}
        if not isinstance(spec.get("name"), str):
            raise GuiderailError(f'--rewards {text}: "name" is missing')
        specs.append(spec)
    return specs


def _json_object(text: str, flag: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise GuiderailError(f"{flag} {text}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise GuiderailError(f"{flag} {text}: must be a JSON object")
    return value


def _print_candidates(candidates: "Sequence[Candidate]", chosen: int | None = None) -> None:
    for place, candidate in enumerate(candidates):
        mark = ">" if place == chosen else " "
        scores = "  ".join(f"{label} {value:.4g}" for label, value in candidate.rewards.items())
        combined = "not scored" if candidate.combined is None else f"{candidate.combined:9.4g}"
        text = candidate.text if len(candidate.text) <= SHOWN else f"...{candidate.text[-SHOWN:]}"
        print(f"{mark}{candidate.index:4}  {combined:>10}  {scores}  {candidate.finish_reason}  {text!r}")


def _print_answer(ctx: "Context", final: "Final", said: str) -> None:
    answer = final.candidates[final.chosen]
    print("chosen from")
    _print_candidates(final.candidates, final.chosen)
    print(f"answer ({final.stopped_by or final.finish_reason}): {said}")
    if said != answer.text:
        print(f"warning: its Tokens have another text than the candidate that Final chooses: {answer.text!r}")
    spend, kl = ctx.spend, ctx.report.kl
    print(
        f"{spend.tokens_generated} tokens generated, {spend.tokens_accepted} in the answer, {spend.reward_calls} score "
        f"calls; KL from the policy {'unknown' if kl is None else f'at most {kl:.3g} nats'}"
    )
    for warning in ctx.report.warnings:
        print(f"warning: {warning}")
