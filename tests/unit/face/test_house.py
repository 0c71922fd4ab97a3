"""The house itself: what is installed, what is exported, and what importing costs."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import glasshive

ROOT = Path(__file__).parents[3]
TOPS = ("client", "dht", "graph", "peer", "security")
SOURCES = [path for top in (*TOPS, "src/glasshive") for path in sorted((ROOT / top).glob("*.py"))]


def test_every_package_on_disk_is_listed() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {"glasshive"} | {
        "glasshive." + init.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for top in TOPS
        for init in (ROOT / top).rglob("__init__.py")
    }
    assert found == set(config["packages"])


def test_exported_names_are_there_and_sorted() -> None:
    assert glasshive.__all__ == sorted(glasshive.__all__)
    for name in glasshive.__all__:
        assert getattr(glasshive, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'pickle'"):
        glasshive.pickle  # noqa: B018


def modules_after(statement: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after a statement."""
    code = f"{statement}; import sys; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_face_loads_nothing_heavy() -> None:
    loaded = modules_after("import glasshive")
    assert not loaded & {"torch", "transformers", "hivemind", "numpy", "rich", "typer"}


@pytest.mark.parametrize(
    "statement",
    [
        "import glasshive.graph.codec, glasshive.graph.split, glasshive.graph.budget",
        "import glasshive.security.envelope, glasshive.security.manifest",
        "import glasshive.dht.records, glasshive.dht.messages, glasshive.dht.memory_transport",
    ],
)
def test_the_rules_load_no_tensor_library(statement: str) -> None:
    assert not modules_after(statement) & {"torch", "transformers", "hivemind"}


def test_this_test_can_fail() -> None:
    assert "torch" in modules_after("import glasshive.graph.kernels")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_is_one_noun_of_fair_size(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 600
    assert ast.get_docstring(ast.parse(text)), "a module says what it holds"
    assert path.stem not in ("utils", "common", "helpers", "base", "misc")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_outside_reaches_code(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", "") or ""}
            assert not names & {"pickle", "marshal", "shelve", "cloudpickle", "dill"}
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            assert "load" not in {alias.name for alias in node.names}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "compile", "__import__")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "pickle.loads", "pickle.load")


# Attributes by names that no text in the code says: where, and why no byte from outside is one.
NAMED_ELSEWHERE = {
    "dht/daemon_control.py": "names of asyncio, in a tuple of the file",
    "dht/member_calls.py": "handlers of hivemind, in a table of the file",
    "dht/messages.py": "fields of our own dataclasses",
    "peer/span_model.py": "attributes and blocks of the model that the host itself has loaded",
    "client/lowering.py": "torch's own names of the call that the researcher made",
    "client/prompts.py": "attributes of the tokenizer, in a tuple of the file",
    "client/swarm.py": "fields of a record, in a tuple of the file",
    "src/glasshive/__init__.py": "what the package exports, in a table of the file",
}
# What finds things by their names, and which argument is the name; of `vars` and `globals` any.
BY_NAME = {
    **dict.fromkeys(("getattr", "setattr", "delattr", "hasattr"), 1),
    **dict.fromkeys(("attrgetter", "import_module"), 0),
    **dict.fromkeys(("vars", "globals"), 99),
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_name_from_outside_reaches_an_attribute(path: Path) -> None:
    """Modules are found by `get_submodule`, at paths that the outline of the twin has."""
    dynamic = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and (place := BY_NAME.get(ast.unparse(node.func).rpartition(".")[2])) is not None
        and not (len(node.args) > place and isinstance(node.args[place], ast.Constant))
    ]
    assert bool(dynamic) == (path.relative_to(ROOT).as_posix() in NAMED_ELSEWHERE), dynamic


def test_every_lazy_name_has_one_home() -> None:
    for name, home in glasshive._HOME.items():
        assert getattr(importlib.import_module(home), name) is getattr(glasshive, name)
