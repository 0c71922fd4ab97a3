"""The docs against the code: every error has its page, trees are true, examples run, links resolve."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import glasshive

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
ERRORS = DOCS / "errors"
PACKAGES = ("graph", "security", "dht", "peer", "client")
ROOTS = {"GlasshiveError", "ModelUnavailableError", "UnseenWrite"}
PAGES = {path.stem: path for path in ERRORS.glob("*.md") if path.stem != "README"}
PROSE = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")])

GLOSSARY = """peer client swarm bootstrap-peer block span route hop hidden-states activation module site
trace invoke step graph node op read write save cut carried-value subgraph tenant whitelist manifest
record receipt audit""".split()


def _sources() -> Iterator[tuple[str, ast.Module]]:
    """(module name, tree) of all of glasshive's own code."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).glob("*.py")):
            yield f"glasshive.{package}.{path.stem}", ast.parse(path.read_text())
    for path in sorted((ROOT / "src" / "glasshive").glob("*.py")):
        yield f"glasshive.{path.stem}", ast.parse(path.read_text())


def _error_classes() -> dict[str, dict[str, set[str]]]:
    """Every error class by name: in which modules it is defined, and its bases there."""
    defined: dict[str, dict[str, set[str]]] = {}
    for module, tree in _sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
                defined.setdefault(node.name, {})[module] = bases
    errors = set(ROOTS)
    while True:
        more = {
            name
            for name, homes in defined.items()
            if name not in errors and any(bases & errors for bases in homes.values())
        }
        if not more:
            return {name: defined[name] for name in errors}
        errors |= more


CLASSES = _error_classes()


def _raised() -> set[str]:
    """The classes that are raised or built somewhere by their own name."""
    return {
        node.func.id
        for _, tree in _sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }


def _families() -> set[str]:
    text = (ERRORS / "README.md").read_text()
    found = re.search(r"never raised themselves: (.*?)\. The trees", text, re.DOTALL)
    assert found is not None
    return set(re.findall(r"`(\w+)`", found.group(1)))


def test_every_error_has_a_page_and_every_page_an_error() -> None:
    assert set(CLASSES) - _families() == set(PAGES)


def test_families_are_never_raised_and_have_members() -> None:
    parents = {base for homes in CLASSES.values() for bases in homes.values() for base in bases}
    assert _families() <= parents
    assert not _families() & _raised()


def test_the_index_lists_every_page_once() -> None:
    listed = re.findall(r"^\| \[(\w+)\]\((\w+)\.md\)", (ERRORS / "README.md").read_text(), re.M)
    assert all(name == page for name, page in listed)
    assert sorted(name for name, _ in listed) == sorted(PAGES)


@pytest.mark.parametrize("name", sorted(PAGES))
def test_page_names_the_class_and_its_parent(name: str) -> None:
    text = PAGES[name].read_text()
    assert text.startswith(f"# {name}\n")
    found = re.search(rf"^`([\w.]+)\.{name}`, a `(\w+)`$", text, re.M)
    assert found is not None, "the second line is `module.Name`, a `Parent`"
    module, parent = found.groups()
    error = getattr(importlib.import_module(module), name)
    assert parent in [base.__name__ for base in error.__mro__[1:]]
    assert "**What to do.**" in text


# The trees in docstrings ------------------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES)
def test_tree_in_the_docstring_is_the_tree_of_classes(package: str) -> None:
    module = importlib.import_module(f"glasshive.{package}.errors")
    here = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, Exception)
        and value.__module__ == module.__name__
    }
    drawn = _tree(module.__doc__ or "")
    assert here.keys() <= drawn.keys()
    assert {name for name in drawn if name not in here} <= {"GlasshiveError"}
    for name, parent in drawn.items():
        if parent is not None and name in here:
            assert here[name].__mro__[1].__name__ == parent


def _tree(docstring: str) -> dict[str, str | None]:
    """The names in a drawn tree, each with its parent; None for a root."""
    found: dict[str, str | None] = {}
    above: list[tuple[int, str]] = []
    for line in docstring.splitlines():
        # Below a branch any name counts; elsewhere only one that stands alone or in a column.
        match = re.match(r"^((?:│   |    )*[├└]── )([A-Z]\w+)(?: |$)", line) or re.match(
            r"^()([A-Z]\w+)(?: {2,}| \(a |$)", line
        )
        if match is None:
            continue
        depth = len(match.group(1))
        while above and above[-1][0] >= depth:
            above.pop()
        found[match.group(2)] = above[-1][1] if above else None
        above.append((depth, match.group(2)))
    return found


# Words and links --------------------------------------------------------------------------------


def test_the_glossary_has_the_words_of_the_design() -> None:
    words = re.findall(r"^\| ([^|]+?) \|", (DOCS / "glossary.md").read_text(), re.M)
    words = [word for word in words if word not in ("word", "---")]
    assert {word.replace("-", " ") for word in GLOSSARY} <= set(words)
    assert words == sorted(words)
    assert len(words) == len(set(words))


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("path", PROSE, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = target.partition("#")
        linked = (path.parent / place).resolve() if place else path
        assert linked.exists(), target
        if anchor:
            assert anchor in _anchors(linked), target


def test_decisions_are_listed_and_numbered() -> None:
    pages = sorted(path.name for path in (DOCS / "adr").glob("[0-9]*.md"))[1:]  # not the template
    listed = re.findall(r"\]\((\d{4}-[\w.-]+\.md)\)", (DOCS / "adr" / "README.md").read_text())
    assert listed[1:] == pages
    assert [int(name[:4]) for name in pages] == list(range(1, len(pages) + 1))


def test_design_names_files_that_exist() -> None:
    table = (DOCS / "design.md").read_text().partition("## Where each thing lives")[2]
    for line in table.splitlines():
        folder = ""
        for name in re.findall(r"`([\w/]+\.py)`", line):
            folder = name.rpartition("/")[0] or folder
            assert (ROOT / folder / name.rpartition("/")[2]).exists(), name


# Examples ---------------------------------------------------------------------------------------


def _blocks(path: Path) -> list[tuple[int, str]]:
    """The Python blocks of a page, each with the number of the line before it."""
    text = path.read_text()
    return [
        (text.count("\n", 0, found.start(1)), found.group(1))
        for found in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.DOTALL)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 12 small blocks, and a tokenizer of words."""
    place = tmp_path_factory.mktemp("docs") / "model"
    words = "The cat sat dog ran big brown".split()
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<pad>", *words])}
    words_only = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words_only.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words_only, unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(place)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def model(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The model over two spans in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLASSHIVE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield glasshive.local(folder, cuts=(6,))


@pytest.fixture
def names(model: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What an example may use, in a folder where it may write."""
    monkeypatch.chdir(tmp_path)
    return {"model": model, "folder": folder, "torch": torch, "glasshive": glasshive}


def _run(path: Path, block: tuple[int, str], names: dict[str, Any]) -> None:
    line, code = block
    exec(compile("\n" * line + code, str(path), "exec"), names)


ERROR_EXAMPLES = sorted(name for name, path in PAGES.items() if _blocks(path))


@pytest.mark.parametrize("name", ERROR_EXAMPLES)
def test_example_of_an_error_raises_it(name: str, names: dict[str, Any]) -> None:
    first, *others = _blocks(PAGES[name])
    with pytest.raises((glasshive.GlasshiveError, Warning, Exception)) as caught:
        _run(PAGES[name], first, names)
    met = {base.__name__ for base in type(caught.value).__mro__}
    assert name in met | {getattr(caught.value, "code", "")}
    for piece in _quoted(PAGES[name]):
        assert piece in str(caught.value)
    for block in others:
        _run(PAGES[name], block, names)


def _quoted(path: Path) -> list[str]:
    """What the page quotes of the error's text; three dots stand for what varies."""
    lines = re.findall(r"^> (.*)$", path.read_text(), re.M)
    return [piece.strip() for piece in " ".join(lines).split("...") if piece.strip()]


GOTCHAS = DOCS / "gotchas.md"


@pytest.mark.parametrize("block", _blocks(GOTCHAS), ids=lambda block: f"line {block[0]}")
def test_gotcha_is_true(block: tuple[int, str], names: dict[str, Any]) -> None:
    _run(GOTCHAS, block, names)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_example_scripts_use_names_that_exist(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("glasshive"):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names)
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "glasshive"
        ):
            assert hasattr(glasshive, node.attr), node.attr
