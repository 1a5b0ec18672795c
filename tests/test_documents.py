"""The documents: every path and heading that they name is there, and the summary of BENCHMARKS.md is that of its sections."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    "ARCHITECTURE.md",
    "README.md",
    "BENCHMARKS.md",
    "benchmarks/NOTES.md",
    "deploy/README.md",
    "deploy/loadtest/README.md",
    "guides/README.md",
    "server/rewards/README.md",
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
TOP = ("benchmarks", "deploy", "guides", "kernels", "server", "tests")
PATH = re.compile(rf"`((?:{'|'.join(TOP)})/[\w./-]*)`")  # from the root
FILE = re.compile(r"`(\w+\.py)`")  # a name alone
PLACEHOLDER = re.compile(r"NAME|OP\.py")
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_names_what_is_there(name: str) -> None:
    page = ROOT / name
    text = FENCED.sub("", page.read_text())
    missing = [path for path in PATH.findall(text) if not (ROOT / path).exists() and not PLACEHOLDER.search(path)]
    missing += sorted(set(FILE.findall(text)) - {path.name for top in TOP for path in (ROOT / top).rglob("*.py")})
    for link in LINK.findall(text):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(link)
    assert missing == []


def test_the_summary_of_benchmarks_is_up_to_date() -> None:
    code = "import report; page = report.PAGE.read_text(); print(all(line in page for line in report._summary(page)))"
    folder = str(ROOT / "tests" / "bench")
    run = subprocess.run([sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {folder!r}); {code}"],
                         capture_output=True, text=True, check=True)  # fmt: skip
    assert run.stdout.strip() == "True"
