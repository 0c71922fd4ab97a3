"""The docs against the code: errors have pages, trees and numbers are true, examples run."""

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
from glasshive import connection, trust_keeper
from glasshive.client import step_watch
from glasshive.dht import (
    directory,
    framing,
    hardening,
    messages,
    records,
    serializer,
    serving,
    unfinished_frames,
)
from glasshive.graph import codec, dtypes, order, plan_codec, tensors
from glasshive.peer import const_cache, file_server, host, memory_book, seen_requests
from glasshive.peer.host_limits import HostLimits
from glasshive.security import envelope, manifest, requests, results, whitelist

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
ERRORS = DOCS / "errors"
PACKAGES = ("graph", "security", "dht", "peer", "client")
ROOTS = {"GlasshiveError", "ModelUnavailableError", "RowTaken", "UnseenWrite"}
PAGES = {path.stem: path for path in ERRORS.glob("*.md") if path.stem != "README"}
PROSE = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")])

GLOSSARY = {
    "peer",
    "client",
    "swarm",
    "bootstrap peer",
    "block",
    "span",
    "route",
    "hop",
    "hidden states",
    "activation",
    "module",
    "site",
    "trace",
    "invoke",
    "step",
    "graph",
    "node",
    "op",
    "read",
    "write",
    "save",
    "cut",
    "carried value",
    "subgraph",
    "tenant",
    "whitelist",
    "manifest",
    "record",
    "receipt",
    "audit",
}


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
    assert set(words) >= GLOSSARY
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


# Threats ----------------------------------------------------------------------------------------

THREATS = DOCS / "threat-model.md"


def _tests_in(path: Path) -> set[str]:
    """The names of a file's tests, those of a class as `Class::test`."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        found |= {
            prefix + one.name
            for one in inner
            if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)
            and one.name.startswith("test_")
        }
    return found


def test_threats_are_all_there_with_their_states() -> None:
    text = THREATS.read_text()
    parts = re.split(r"^### (T\d+)\. .*: (\w+)$", text.partition("\n## What stays")[0], flags=re.M)
    names, states, bodies = parts[1::3], parts[2::3], parts[3::3]
    assert names == [f"T{number}" for number in range(1, 21)]
    for name, state, body in zip(names, states, bodies, strict=True):
        assert state in ("holds", "partly", "open"), name
        assert ("\nMissing: " in body) == (state == "partly"), name
        if state == "holds":
            assert "::test_" in body, name
        if state == "open":
            assert "Later work." in body, name
    assert dict(zip(names, states, strict=True))["T10"] == "open"


@pytest.mark.parametrize("path", PROSE, ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_that_are_named_exist(path: Path) -> None:
    named = re.findall(r"`(tests/[^`]*?)::([^`]*)`", path.read_text())
    assert named or path != THREATS
    for file, name in named:
        assert name in _tests_in(ROOT / file), f"{file}::{name}"


def test_files_that_threats_name_exist() -> None:
    for name in re.findall(r"`([\w/.]+/[\w.]+\.py)`", THREATS.read_text()):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("name", ["for-hosts", "for-researchers"])
def test_pages_for_the_hurried_are_short(name: str) -> None:
    assert (DOCS / f"{name}.md").read_text().count("\n") <= 60


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("threat-model", f"at most {host.MAX_FAILURE_CHARS} characters"),
        ("threat-model", f"allows {whitelist.MAX_LIFETIME_SECONDS // 86_400} days"),
        ("threat-model", f"a host looks every {trust_keeper.PERIOD_SECONDS:g} s"),
        ("threat-model", f"knows the root looks every {connection._KEEP_SECONDS:g} s"),
    ],
)
def test_numbers_of_the_threats_are_the_code(name: str, text: str) -> None:
    assert text in " ".join((DOCS / f"{name}.md").read_text().split())


# The protocol -----------------------------------------------------------------------------------

PROTOCOL = " ".join((DOCS / "protocol.md").read_text().split())
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def _cells(heading: str) -> list[list[str]]:
    """The rows of the first table below a heading of the protocol."""
    below = (DOCS / "protocol.md").read_text().partition(f"\n## {heading}\n")[2]
    table = re.search(r"(?:^\|.*\n)+", below, re.M)
    assert table is not None
    rows = [line.strip("| \n").split(" | ") for line in table.group().splitlines()]
    return rows[2:]


def test_table_of_messages_is_the_code() -> None:
    rows = _cells("8. Messages")
    assert {int(row[0]): row[1] for row in rows} == {
        code: kind.__name__ for code, kind in messages._CODES.items()
    }
    for row in rows:
        kind = messages._CODES[int(row[0])]
        named = row[2].replace("(counts)", "(count)").replace("(counts: part indices)", "(count)")
        count = 0 if row[2] == "-" else len(named.split(", "))
        assert count == len(kind.__dataclass_fields__), row


def test_table_of_nodes_is_the_code() -> None:
    rows = _cells("10. The graph's bytes")
    known = {row[0]: row for row in rows}
    for kind, (fields, decode) in codec._DECODERS.items():
        row = known.pop(str(kind))
        assert row[1] == decode.__name__
        named = row[2].replace("[arg, ...]", "args").replace("[size, ...]", "sizes")
        assert len(named.split(", ")) == fields
    later = [kind for kind in codec._LATER if isinstance(kind, int)]
    (reserved,) = known.values()
    assert reserved[0] == f"{min(later)}-{max(later)}"
    assert reserved[1] == ", ".join(codec._LATER.values())


def test_files_of_the_protocol_are_the_code() -> None:
    listed = {
        name.strip("`"): int(row[1].removesuffix(" MiB")) * MIB
        for row in _cells("6. Files")
        for name in row[0].split(", ")
        if row[1].endswith("MiB")
    }
    text = (DOCS / "protocol.md").read_text().partition("| file | most bytes")[2]
    listed |= {
        name: int(size) * MIB
        for names, size in re.findall(r"^\| (`.*`) \| (\d+) MiB \|$", text, re.M)
        for name in re.findall(r"`([\w.]+)`", names)
    }
    assert listed == manifest.CLIENT_FILES


FRAMES, LIMITS, HOST = framing.FrameLimits(), codec.GraphLimits(), HostLimits()
STEPS = step_watch.STEP_LIMITS
STREAMS, UNFINISHED = serving.StreamLimits(), unfinished_frames.UnfinishedLimits()


@pytest.mark.parametrize(
    "text",
    [
        f"header {FRAMES.header_bytes // MIB} MiB, body {FRAMES.body_bytes // MIB} MiB",
        f"than {UNFINISHED.per_remote_bytes // MIB} MiB of one remote peer, "
        f"{UNFINISHED.per_origin_bytes // MIB} MiB from one address and "
        f"{UNFINISHED.in_all_bytes // MIB} MiB in all",
        f"At most {FRAMES.header_depth} containers deep and {FRAMES.header_elements:,} elements",
        f"at most {framing.MAX_REFUSAL_BYTES} bytes, that says why",
        f"({STREAMS.per_remote} per remote peer, {STREAMS.per_origin} from one address, "
        f"{STREAMS.in_all:,} in all)",
        f"({STREAMS.new_per_second:g} a second of one remote peer, {STREAMS.burst} at once)",
        f"of code `Busy` counts as {serving.BUSY_TOKENS}.",
        f"Only {serving.REFUSALS_PER_REMOTE} such refusals go to one peer at a time",
        f"its first frame has not begun in {STREAMS.first_frame_seconds:g} s",
        f"at no less than {FRAMES.least_bytes_per_second:,} bytes a second, averaged over "
        f"{FRAMES.stall_seconds:g} s",
        f"Bodies above {framing.SLICE_BYTES // KIB} KiB",
        f"`{envelope._PAYLOAD_TYPE.decode()}`",
        f"has at most {envelope.MAX_REQUEST_ID_BYTES} bytes, texts at most {envelope._MAX_TEXT}",
        f"an envelope at most {envelope.MAX_ENVELOPE_BYTES // MIB} MiB",
        f"Clocks may differ by {envelope.CLOCK_SKEW_SECONDS:.0f} s",
        f"at most {records.MAX_LIFETIME_SECONDS:.0f} s, at most {records.MAX_RECORD_BYTES:,} bytes",
        f"start < end <= n <= {records.MAX_BLOCKS}",
        f"array of at most {records.MAX_ADDRESSES} multiaddrs",
        f"then every {records.MAX_LIFETIME_SECONDS / 3:.0f} s with an expiry",
        f"values of {serializer.MAX_VALUE_BYTES // KIB} KiB and {serializer.MAX_DEPTH} levels",
        f"{serializer.MAX_ELEMENTS:,} elements at a level of extension",
        f"dictionaries of {serializer.MAX_DICTIONARY_BYTES // MIB} MiB and "
        f"{serializer.MAX_DICTIONARY_ENTRIES:,} entries",
        f"(str <= {serializer.MAX_SUBKEY_BYTES} bytes, bin <= {serializer.MAX_ENTRY_BYTES // KIB}",
        f"{hardening.MAX_KEYS_PER_FIND} keys in a find call, {hardening.MAX_KEYS_PER_STORE:,} in a",
        f"{hardening.MAX_STORED_KEYS:,} stored keys",
        f"at most {directory.MAX_RECORDS:,} records and {directory.MAX_ANSWER_BYTES // MIB} MiB",
        f"those before have been silent for {directory.APART_SECONDS:g} s",
        f"nobody has more than {directory.PEER_DEADLINE_SECONDS:.0f} s",
        f"asks the next peer after {messages.SILENCE_SECONDS:.0f} s of silence",
        f"At most {manifest.MAX_FILES:,} files and {manifest.MAX_MANIFEST_BYTES // MIB} MiB",
        f"has 1 to {manifest.MAX_NAME_CHARS} characters",
        f"a str of at most {messages.MAX_TEXT_CHARS:,} characters",
        f"an array of 1 to {requests.MAX_PEERS} pairs `[peer id, record]`",
        f"of the others an empty bin; at most {requests.MAX_RECORD_BYTES:,} bytes",
        f"a bin of 1 byte to {requests.MAX_REQUEST_BYTES // KIB} KiB",
        f"valid for at most {requests.REQUEST_SECONDS:.0f} s",
        f"texts of 1 to {requests.MAX_TEXT} characters",
        f"at most {seen_requests.MAX_REQUESTS_PER_CLIENT:,} of one client and "
        f"{seen_requests.MAX_REQUESTS:,} in all",
        f"for {results.RESULT_SECONDS:.0f} s, at most {results.MAX_RESULT_BYTES // KIB} KiB",
        f"in slices of {messages.SLICE_BYTES // KIB} KiB",
        f"first slice, at most {messages.SLICE_BYTES // KIB} KiB",
        f"`Alive` every {messages.ALIVE_SECONDS:g} s",
        f"nothing came for {messages.SILENCE_SECONDS:g} s",
        f"after {STEPS.least_seconds:g} s, or {STEPS.factor:g} times what the stage is thought to "
        f"take ({STEPS.most_seconds:g} s at most)",
        f"no more than {step_watch._MOST_BETWEEN_SECONDS:g} s are counted",
        f"dtypes: `{' '.join(dtype.value for dtype in dtypes.DType)}`",
        f"At most {tensors.MAX_RANK} axes and 2^{tensors.MAX_TENSOR_BYTES.bit_length() - 1} bytes",
        f"Caps: {LIMITS.graph_bytes // MIB} MiB; {LIMITS.nodes:,} nodes; {LIMITS.imports:,} "
        f"imports; {LIMITS.node_args} arguments of a node; {LIMITS.list_items:,} items of a list; "
        f"lists nested {LIMITS.nesting} deep; {LIMITS.node_elements:,} values in a node; texts of "
        f"{LIMITS.text_chars} characters; leaves of "
        f"{LIMITS.leaf_parts} parts",
        f"{LIMITS.invokes:,} invokes; {LIMITS.saves:,} saves; a constant of "
        f"2^{LIMITS.const_bytes.bit_length() - 1} bytes",
        f"At most {plan_codec._FRAME_SLACK * LIMITS.graph_bytes // MIB} MiB, "
        f"{plan_codec.MAX_PASSES:,} stages, {plan_codec.MAX_PASSES:,} passes, "
        f"{plan_codec.MAX_ROWS:,} rows, 2^{plan_codec.MAX_TOKENS.bit_length() - 1} tokens",
        f"at most {order.DEFAULT_PASS_ROWS} rows unless",
        f"| traces at a time | {HOST.traces} |",
        f"| traces at a time of one client | {HOST.traces_per_client} |",
        f"this machine's own not counted | {HOST.traces_per_origin} |",
        f"by the host's own estimate, from its measured pace | {HOST.budget.seconds:g} |",
        f"may take {HOST.stage_factor:g} times the estimate of its part and "
        f"{HOST.stage_least_seconds:g} s more",
        f"{HOST.node_factor:g} times the estimate of its part and "
        f"{HOST.node_least_seconds:g} s more, or longer than a trace may",
        f"| seconds of a trace | {HOST.trace_seconds:.0f} |",
        f"| {HOST.batch_rows} rows, {HOST.context_tokens:,} tokens |",
        f"worst moment | {HOST.budget.peak_bytes // GIB} GiB |",
        f"included | {100 * memory_book.LENT_SHARE:.0f} % of the memory that is free at the start",
        f"saved bytes of a part | {HOST.budget.saved_bytes // GIB} GiB |",
        f"not counted | 10^{len(str(HOST.budget.flops)) - 1} |",
        f"over all clients | {HOST.const_cache_bytes // GIB} GiB |",
        f"a valid `Prepare` within {HOST.prepare_seconds:.0f} s",
        f"answers {file_server.MAX_ANSWERS} questions at a time, each within "
        f"{file_server.ANSWER_SECONDS:.0f} s",
        f"each for {const_cache.LEASE_SECONDS:.0f} s after its last use",
        f"each counted with {const_cache.ENTRY_BYTES:,} bytes more than its elements",
    ],
)
def test_numbers_of_the_protocol_are_the_code(text: str) -> None:
    assert text in PROTOCOL


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
    words = ["The", "cat", "sat", "dog", "ran", "big", "brown"]
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<pad>", *words])}
    words_only = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words_only.pre_tokenizer = pre_tokenizers.Whitespace()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=words_only, unk_token="<unk>", pad_token="<pad>").save_pretrained(place)
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
RESEARCHERS = DOCS / "for-researchers.md"


def test_example_for_researchers_runs(names: dict[str, Any]) -> None:
    (block,) = _blocks(RESEARCHERS)
    _run(RESEARCHERS, block, names)
    assert len(names["states"]) == names["tracer"].new_tokens.shape[1]


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
