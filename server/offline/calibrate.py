"""`guiderail rewards calibrate`: store a reward's values of the served model's answers, prompt by prompt, in one file.

`guiderail serve --calibration FILE` takes quantiles from it for requests that sample in the same way: for a prompt of
the file from that prompt's own values; for any other prompt from all values together, and only if
`calibration.source` is "pooled". The response says which. A prompt that the reward fails on is named and left out.
The format is described in server/scoring/calibration_file.py.

Answers and scores are kept in OUT.progress.jsonl until the file is written; after an interruption the same command
resumes from there.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from guiderail.guides.core.errors import GuiderailError
from guiderail.server.offline.options import (
    REWARD_HELP,
    add_engine_arguments,
    journal_of,
    parse_reward,
    pin_weights,
    settings_for,
    terms_of,
)

if TYPE_CHECKING:
    from guiderail.server.state import ServerState


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = parser.add_argument
    add("--prompts", required=True, metavar="FILE", help='.jsonl or .jsonl.gz of {"messages": [...]} or {"prompt": ""}')
    add("--reward", dest="scored", required=True, metavar="REWARD", help=REWARD_HELP)
    add("-n", "--samples", type=int, default=100, metavar="N", help="answers drawn for each prompt (100)")
    add("--max-tokens", type=int, default=256, help="maximum number of tokens in an answer (256)")
    add("--temperature", type=float, default=1.0, help="sampling temperature (1)")
    add("--top-p", type=float, default=1.0, help="probability mass of nucleus sampling (1)")
    add("--seed", type=int, default=0, help="seed of the answers (0)")
    add("--out", required=True, metavar="FILE.safetensors", help="file to write; it must not exist yet")
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status. Raises GuiderailError."""
    from guiderail.guides.core.types import SamplingSpec
    from guiderail.guides.prompters import Template
    from guiderail.server.models import catalogue
    from guiderail.server.models.model_fingerprint import fingerprint
    from guiderail.server.offline.evaluate.draw import draw, score_all
    from guiderail.server.offline.offline_state import run_offline
    from guiderail.server.offline.prompt_file import read_prompts
    from guiderail.server.scoring import calibration_file as calibration_store

    out = Path(args.out)
    if out.exists():
        raise GuiderailError(f"--out {out}: this file already exists")
    if args.samples < 2:
        raise GuiderailError("-n must be at least 2")
    reward = parse_reward(args.scored)
    settings = settings_for(args, [reward])
    file = read_prompts(Path(args.prompts))
    sampling = SamplingSpec(args.max_tokens, args.temperature, args.top_p, seed=args.seed)

    kept = ("scored", "samples", "max_tokens", "temperature", "top_p", "seed")
    with journal_of(out, settings, ours=kept, args=args, data=file.sha256) as journal:

        async def main(state: "ServerState") -> int:
            pin_weights(journal, state)
            (term,) = terms_of(state, [reward])
            pools = await draw(state, file.prompts, args.samples, sampling, journal)
            whole, (values,) = await score_all(state, pools, [term], journal)
            keys = [calibration_store.prompt_key(pools[index].prompt) for index in whole]
            by_prompt = dict(zip(keys, values, strict=True))
            out.parent.mkdir(parents=True, exist_ok=True)
            calibration_store.save(
                out,
                by_prompt,
                model=settings.model_name,
                model_revision=fingerprint(catalogue.resolve(settings.model, settings.cache)),
                reward=term.name,
                reward_revision=state.rewards[term.name].revision(),
                params=calibration_store.params_key(term.params),
                sampling={**calibration_store.conditions(sampling, Template().dump()), "seed": args.seed},
            )
            journal.finish()
            print(f"{len(by_prompt)} prompts x {args.samples} values of '{term.name}' in {out}")
            return 0

        return run_offline(settings, main)
