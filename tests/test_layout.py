"""The shape of the source tree: import direction, where vLLM is imported, what transformers can mistake."""

import ast
import importlib
import inspect
import os
import subprocess
import sys
import tomllib
from collections import Counter
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "guides", "server")  # the server may import the others, which know only themselves
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
LOADTEST = sorted((ROOT / "deploy" / "loadtest").rglob("*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_file_keeps_the_rules(path: Path) -> None:
    names = imports(path)
    own = path.relative_to(ROOT).parts[0]
    for other in set(PACKAGES) - {own} if own != "server" else ():
        assert not any(n == f"guiderail.{other}" or n.startswith(f"guiderail.{other}.") for n in names)
    keeps_the_common_rules(path, names)
    if not path.is_relative_to(ROOT / "server" / "engines" / "vllm"):
        assert not any(n.split(".")[0] == "vllm" for n in names), "vLLM is imported in server/engines/vllm alone"


def keeps_the_common_rules(path: Path, names: set[str]) -> None:
    assert not any(n.split(".")[0] in PACKAGES for n in names), "imports go through guiderail."
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "says in its first lines what it does"
    assert text.count("\n") <= 300


@pytest.mark.parametrize("path", LOADTEST, ids=lambda p: p.name)
def test_the_load_test_knows_servers_by_http_alone(path: Path) -> None:
    names = imports(path)
    keeps_the_common_rules(path, names)
    ours = {n for n in names if n.startswith("guiderail.") and not n.startswith("guiderail.loadtest")}
    assert all(n.startswith("guiderail.guides.core.errors") for n in ours)
    assert not any(n.split(".")[0] in ("torch", "vllm", "transformers", "fastapi") for n in names)


def test_every_package_is_distributed() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(config["tool"]["setuptools"]["packages"])
    folders = [path.parent.relative_to(ROOT) for path in FILES]
    folders += [path.parent.relative_to(ROOT / "deploy") for path in LOADTEST]
    assert listed == {".".join(["guiderail", *folder.parts]) for folder in folders}


def test_a_file_name_occurs_once() -> None:
    names = Counter(path.name for path in (*FILES, *LOADTEST) if path.name != "__init__.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_every_package_says_what_it_is() -> None:
    folders = {path.parent for path in (*FILES, *LOADTEST)}
    assert [
        folder for folder in folders if not ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    ] == []


SOURCES = {path: path.read_text() for path in FILES}


def concrete(base: type) -> list[type]:
    """The classes below a base, of our own and not of plugins and tests, that can be made."""
    for path in SOURCES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] == "guides" or parts[:2] == ("server", "rewards"):
            importlib.import_module(".".join(["guiderail", *parts]).removesuffix(".__init__"))
    below = base.__subclasses__()
    found = below + [each for sub in below for each in concrete(sub)]
    ours = [each for each in found if each.__module__.startswith(("guiderail.guides", "guiderail.server"))]
    return [each for each in dict.fromkeys(ours) if not inspect.isabstract(each) and not each.__name__.startswith("_")]


def test_every_kernel_has_a_caller_in_the_server() -> None:
    import guiderail.kernels

    used = {name for path in FILES if path.is_relative_to(ROOT / "server") for name in imports(path)}
    for name in guiderail.kernels.__all__:
        wanted = {f"guiderail.kernels.{name}", f"guiderail.kernels.{name}.{name}"}
        assert used & wanted, f"no request reaches the kernel {name}"
    everywhere = used | {name for path in (ROOT / "kernels").glob("[!_]*.py") for name in imports(path)}
    modules = {f"guiderail.kernels.{path.stem}" for path in (ROOT / "kernels").glob("*.py") if path.stem != "__init__"}
    assert [module for module in sorted(modules) if module not in everywhere] == []


def test_every_guide_and_reward_can_be_asked_for() -> None:
    """By its entry point, or made by the server, as the rewards of `--reward NAME=...` are."""
    from guiderail.guides.core.guide import Guide
    from guiderail.guides.core.reward import Reward

    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    named = {value for group in entries.values() for value in group.values()}
    guides, rewards = concrete(Guide), concrete(Reward)
    assert len(guides) >= 8
    assert len(rewards) >= 10
    for each in (*guides, *rewards):
        own = Path(inspect.getfile(each)).resolve()
        used = any(each.__name__ in text for path, text in SOURCES.items() if path.resolve() != own)
        assert f"{each.__module__}:{each.__name__}" in named or used, f"{each.__qualname__} is never asked for"


def test_every_transform_and_selection_rule_can_be_asked_for() -> None:
    from guiderail.guides.scoring import SELECTIONS, Selection
    from guiderail.guides.scoring.chain import TRANSFORMS
    from guiderail.guides.scoring.transforms import Transform

    assert set(concrete(Selection)) == set(SELECTIONS.values())
    assert set(concrete(Transform)) == set(TRANSFORMS.values())


def test_helpers_of_tests_lie_in_one_folder() -> None:
    """Two of one name, both on sys.path, are taken for each other in a full run and in no partial one."""
    tests = ROOT / "tests"
    known = (tests / "support", tests / "bench", tests / "plugin_example")
    elsewhere = [path for path in tests.rglob("*.py") if not any(path.is_relative_to(k) for k in known)]
    assert [p.name for p in elsewhere if not p.name.startswith("test_") and p.name != "conftest.py"] == []


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("guiderail", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def test_no_module_imports_one_that_imports_it() -> None:
    """By whatever way round; imports in functions and for type checkers count."""
    modules = {module(path): path for path in FILES}
    graph = {name: sorted((imports(path) & modules.keys()) - {name}) for name, path in modules.items()}
    for name, path in modules.items():  # `from package import module` imports the module, and not what the package does
        froms = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        only = {n.module for n in froms if all(f"{n.module}.{alias.name}" in modules for alias in n.names)}
        graph[name] = [other for other in graph[name] if other not in only]
    TopologicalSorter(graph).prepare()  # raises CycleError, which shows the cycle


BELOW = {  # packages of server/ and those of its parts that they may not import, by whatever module
    "requests": ("api", "offline"),
    "engines": ("api", "requests", "scoring", "rewards", "offline"),
    "rewards": ("api", "requests", "scoring", "offline"),
    "scoring": ("api", "requests", "offline"),
    "models": ("api", "requests", "scoring", "rewards", "engines", "offline"),
    "bounded": ("api", "requests", "scoring", "rewards", "engines", "models", "offline"),
    "remote": ("api", "requests", "scoring", "rewards", "engines", "models", "offline"),
    "memory": ("api", "requests", "scoring", "engines", "offline"),
    "api": ("offline",),
}


@pytest.mark.parametrize("package", BELOW)
def test_the_packages_of_the_server_know_nothing_of_those_above(package: str) -> None:
    for path in (ROOT / "server" / package).rglob("*.py"):
        parts = {name.split(".")[2] for name in imports(path) if name.startswith("guiderail.server.")}
        assert not parts & set(BELOW[package]), path


def test_guides_do_not_know_where_their_parameters_stand_in_a_request() -> None:
    assert [path for path in FILES if path.is_relative_to(ROOT / "guides") and "alignment." in path.read_text()] == []


def test_guides_need_neither_torch_nor_vllm() -> None:
    code = "import sys, guiderail.guides; print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_kernels_is_not_importable_by_its_bare_name_here() -> None:
    spec = find_spec("kernels")
    places = [] if spec is None else [spec.origin or "", *(spec.submodule_search_locations or ())]
    assert not any(Path(place).is_relative_to(ROOT) and ".venv" not in place for place in places)


def test_transformers_is_not_fooled_from_the_repository_root() -> None:
    """Where the root is on sys.path (as under `python -m`), our command takes it off before anything else."""
    probe = (
        "import importlib.util, runpy, sys; sys.argv = ['guiderail', 'version']\n"
        "assert importlib.util.find_spec('kernels').origin.endswith('kernels/__init__.py'), 'the trap is not set'\n"
        "try: runpy.run_module('guiderail.server.cli', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "import transformers.integrations.hub_kernels\n"
        "print('fooled', is_kernels_available(), 'kernels' in sys.modules)\n"
    )
    env = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    run = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, env=env, capture_output=True, text=True)
    assert "fooled False False" in run.stdout, run.stdout + run.stderr


def test_no_machine_paths_or_hosts_are_committed() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        path = ROOT / name
        if path.suffix in {".png", ".safetensors", ".gz"} or path.is_symlink():
            continue
        assert "/work/" + "main" not in path.read_text(), name
