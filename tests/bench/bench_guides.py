"""Cost of the guides on the real engine: `make bench-guides` (about an hour on 2 cores; ARGS="--only blocks" for a part).

speed      tokens/s and seconds per answer of every guide, with a neural reward and a rule, alone and 8 at once
plain      Transfer Q* and DeAL against the published loop on plain transformers, at three prompt lengths
blocks     controlled decoding with K = 8 against plain sampling of 8 answers
rejection  speculative rejection against best-of-32: reward and tokens

Requests take the path of HTTP requests, inside this process. Raw results go to --raw as they come; --resume
continues from them.
"""

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH is set
from asking import HEAD, LIMITS, Raw, publish
from guides_plain import LENGTHS, against_plain
from guides_rejection import rejection
from guides_speed import blocks, speed
from report import Results

from guiderail.server.offline.offline_state import offline
from guiderail.server.settings import Settings
from guiderail.server.state import ServerState

Part = Callable[[ServerState, Raw], Awaitable[Results]]


def parts(args: argparse.Namespace) -> dict[str, tuple[str, Part]]:
    """Title and work of each part; a rehearsal does the least that goes through all of it."""
    small = args.rehearse
    answers = {"Transfer Q*": args.plain_answers, "DeAL": max(1, args.plain_answers // 2)}
    return {
        "speed": (
            "Speed of the guides",
            lambda state, raw: speed(state, raw, 1, 8) if small else speed(state, raw, args.singles),
        ),
        "blocks": (
            "Block-level guides against plain sampling",
            lambda state, raw: blocks(state, raw, 1 if small else args.rounds),
        ),
        "rejection": (
            "Speculative rejection against best-of-32",
            lambda state, raw: rejection(state, raw, 2 if small else args.prompts, 2 if small else args.choosing),
        ),
        "plain": (
            "Token-level search against plain transformers",
            lambda state, raw: (
                against_plain(state, raw, 8, dict.fromkeys(answers, 1), LENGTHS[:1])
                if small
                else against_plain(state, raw, 32, answers)
            ),
        ),
    }


async def main(args: argparse.Namespace) -> None:
    """Run the parts and publish each as it is done."""
    raw = Raw(args.raw, {key: value for key, value in vars(args).items() if key not in OF_THE_RUN}, resume=args.resume)
    settings = Settings(reward={"harmless": {"path": HEAD}}, rewards=["sentiment", "length"], limits=LIMITS)
    async with offline(settings) as state:
        for name, (title, work) in parts(args).items():
            if args.only in (None, name):
                print(f"part {name}", file=sys.stderr, flush=True)
                lines, data, targets = await work(state, raw)
                publish(args.rehearse, f"guides_{name}", title, "make bench-guides", lines, data, targets)


OF_THE_RUN = ("raw", "resume", "only")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("speed", "blocks", "rejection", "plain"))
    parser.add_argument("--singles", type=int, default=3, help="single requests per guide (3)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of part blocks (5)")
    parser.add_argument("--prompts", type=int, default=48, help="prompts of everyday.jsonl for part rejection (48)")
    parser.add_argument(
        "--choosing", type=int, default=24, help="prompts of more.jsonl to choose alpha and interval by (24)"
    )
    parser.add_argument(
        "--plain-answers", type=int, default=2, help="answers of plain Transfer Q*; half as many of DeAL (2)"
    )
    parser.add_argument("--raw", type=Path, default=Path(tempfile.gettempdir()) / "guiderail-bench-guides.jsonl")
    parser.add_argument("--resume", action="store_true", help="continue from the raw results that are there")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes; prints the tables and writes nothing")
    asyncio.run(main(parser.parse_args()))
