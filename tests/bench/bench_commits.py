"""This tree against an earlier commit of it: `make bench-commits ARGS="--commit SHA"` (about 20 minutes on 2 cores).

Both commits' servers are live at once and take turns with the same requests, of `make bench` (best of n, streamed chats)
and of `make bench-load` (plain chats). Two processes of one server differ by up to a tenth for as long as they live, so
each round starts a new pair. A ratio is above 1 where this tree is faster; it is the median over pairs of turns, with a
95 % bootstrap interval. Writes benchmarks/commits.json and its part of BENCHMARKS.md.
"""

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH is set
from bench_peers import AT_ONCE, TOKENS, Guided, N, Script, Turn, cases, rate
from load_servers import CONTEXT, running
from measured import pair_table, paired
from report import ROOT, Target, write_section

PLAIN = 6  # plain chats, one after another


@contextmanager
def tree_of(commit: str) -> Iterator[Path]:
    """A folder with the files of a commit, and with its entry points as an installation would have them."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit], check=True, capture_output=True).stdout
        tree.mkdir()
        subprocess.run(["tar", "-x", "-C", str(tree)], input=archive, check=True)
        project = tomllib.loads((tree / "pyproject.toml").read_text())["project"]
        info = tree / ".types" / f"{project['name']}-{project['version']}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        groups = [
            f"[{group}]\n" + "".join(f"{name} = {place}\n" for name, place in named.items())
            for group, named in project["entry-points"].items()
        ]
        (info / "entry_points.txt").write_text("\n".join(groups))
        yield tree


@contextmanager
def server(tree: Path, log: Path) -> Iterator[str]:
    """URL of `guiderail serve` of a tree, with the packages that are installed here."""
    start = "import guiderail.server.cli as cli; raise SystemExit(cli.main())"
    command = [sys.executable, "-P", "-c", start, "serve", "--max-model-len", CONTEXT]
    path = os.pathsep.join(filter(None, [str(tree / ".types"), os.environ.get("PYTHONPATH", "")]))
    with running(command, log, {"PYTHONPATH": path}) as (_, url):
        yield url


def turns() -> dict[str, Turn]:
    """A turn of each case; see bench_peers.cases."""

    async def one_by_one(side: Script, first: int) -> list[int]:
        return [await side.streamed(first + i) for i in range(PLAIN)]

    chosen = (f"best of {N}, {2 * AT_ONCE} prompts", "best of 16, alone", "streamed")
    found = {name: turn for name, turn in cases(prompts=2 * AT_ONCE).items() if name.startswith(chosen)}
    return found | {
        "streamed chats, one after another": lambda side, first: rate(one_by_one(side, first), PLAIN * TOKENS)
    }


async def take_turns(old: str, new: str, number: int, times: int, found: dict[str, list[list[float]]]) -> None:
    """Add pairs (old, new) of tokens per second to each case; a first turn of each only warms both up."""
    sides = [(0, Guided(old)), (1, Guided(new))]
    try:
        for k, (name, turn) in enumerate(turns().items()):
            for time in range(times + 1):
                first = 1_000_000 * (number + 1) + 10_000 * time + 1000 * k
                pair = [0.0, 0.0]
                for place, side in sides if time % 2 else reversed(sides):
                    pair[place] = await turn(side, first + 500 * place)
                found.setdefault(name, []).extend([pair] if time else [])
                print(
                    f"{number} {time}/{times} {name}: {pair[0]:.1f} {pair[1]:.1f} {pair[1] / pair[0]:.3f}",
                    file=sys.stderr,
                )
    finally:
        for _, side in sides:
            await side.close()


def report(commit: str, found: dict[str, list[list[float]]]) -> None:
    """Write the section."""
    table, targets, data = [], [], {}
    for name, pairs in found.items():
        each = paired(pairs, by_interval=True)
        met = each.high >= 1
        table.append((name, each, "tokens/s", f"1.0 in the interval | {'met' if met else '**missed**'}"))
        result = f"{each.ratio:.3f} ({each.low:.3f}-{each.high:.3f})"
        targets.append(Target(f"tokens/s, this tree / commit {commit}: {name}", "interval reaches 1.0", result, met))
        data[name] = {"pairs": pairs, "ratio": each.ratio, "interval": [each.low, each.high], "met": met}
    lines = [
        f"Tokens per second of `guiderail serve` at commit {commit} and of this tree, {min(map(len, found.values()))} interleaved "
        "pairs of turns over freshly started pairs of servers. Ratio: median over pairs with its 95 % interval.",
        "",
        *pair_table(commit, "this tree", "95 % interval", table),
    ]
    write_section(
        "commits", f"Against commit {commit}", f'make bench-commits ARGS="--commit {commit}"', lines, data, targets
    )


def main() -> None:
    """Compare, and write the section after each round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", required=True, help="the earlier commit")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of servers (3)")
    parser.add_argument("--turns", type=int, default=3, help="pairs of turns of each case and pair of servers (3)")
    args = parser.parse_args()
    found: dict[str, list[list[float]]] = {}
    with tree_of(args.commit) as old:
        for number in range(args.rounds):
            with ExitStack() as stack:
                logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                places = [(old, logs / "old.log"), (ROOT, logs / "new.log")]
                urls = {}
                for tree, log in places if number % 2 else reversed(places):
                    urls[tree] = stack.enter_context(server(tree, log))
                asyncio.run(take_turns(urls[old], urls[ROOT], number, args.turns, found))
            report(args.commit, found)


if __name__ == "__main__":
    main()
