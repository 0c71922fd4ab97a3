"""docs/api.md against the code: signatures, fields, settings, variables."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import glasshive
from glasshive.client.generation import Generation
from glasshive.client.provenance import Hop, Provenance
from glasshive.passphrases import PASSPHRASE_VARIABLE
from glasshive.settings import CONFIG_VARIABLE, DATA_VARIABLE, Settings
from glasshive.testing import LocalSwarm

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "api.md").read_text()
CALLS: dict[str, Callable[..., Any]] = {
    "connect": glasshive.connect,
    "model": glasshive.Swarm.model,
    "records": glasshive.Swarm.records,
    "close": glasshive.Swarm.close,
    "local": glasshive.local,
    "trace": glasshive.Model.trace,
    "generate": glasshive.Model.generate,
    "all": Generation.all,
    "next": Generation.next,
    "save": glasshive.save,
    "invoke": glasshive.Tracer.invoke,
    "barrier": glasshive.Tracer.barrier,
    "cancel": glasshive.Tracer.cancel,
    "estimate": glasshive.Tracer.estimate,
    "profile": glasshive.Tracer.profile,
    "stop": glasshive.Tracer.stop,
    "LocalSwarm": LocalSwarm.__init__,
}
WRITTEN = {
    code.partition("(")[0].removeprefix("def "): code
    for code in re.findall(r"^```python\n(def .*?)^```$", PAGE, re.M | re.DOTALL)
}


def said(code: str) -> inspect.Signature:
    """The signature that the page gives, with everything as source text."""
    (made,) = ast.parse(code).body
    assert isinstance(made, ast.FunctionDef)
    plain = made.args.args
    defaults = [None] * (len(plain) - len(made.args.defaults)) + list(made.args.defaults)
    kinds = inspect.Parameter
    both = [
        *((one, default, kinds.POSITIONAL_OR_KEYWORD) for one, default in zip(plain, defaults)),  # noqa: B905
        *(
            (one, default, kinds.KEYWORD_ONLY)
            for one, default in zip(made.args.kwonlyargs, made.args.kw_defaults, strict=True)
        ),
        *((one, None, kinds.VAR_KEYWORD) for one in [made.args.kwarg] if one is not None),
    ]
    return inspect.Signature(
        [
            inspect.Parameter(
                one.arg,
                kind,
                default=kinds.empty if default is None else ast.unparse(default),
                annotation=source(one.annotation),
            )
            for one, default, kind in both
        ],
        return_annotation=source(made.returns),
    )


def source(annotation: ast.expr | None) -> str:
    return "" if annotation is None else ast.unparse(annotation)


def real(call: Callable[..., Any]) -> inspect.Signature:
    """The signature of the code, with everything as source text and without `self`."""
    found = inspect.signature(call)
    return found.replace(
        parameters=[
            one.replace(
                default=one.default if one.default is one.empty else repr(one.default),
                annotation=source(ast.parse(one.annotation, mode="eval").body),
            )
            for name, one in found.parameters.items()
            if name != "self"
        ],
        return_annotation=source(ast.parse(found.return_annotation, mode="eval").body),
    )


def test_every_call_has_its_signature() -> None:
    assert WRITTEN.keys() == CALLS.keys()


@pytest.mark.parametrize("name", CALLS)
def test_signature_is_that_of_the_code(name: str) -> None:
    assert said(WRITTEN[name]) == real(CALLS[name])


def first_column(heading: str) -> list[str]:
    below = PAGE.partition(heading)[2]
    table = re.search(r"(?:^\|.*\n)+", below, re.M)
    assert table is not None
    return re.findall(r"^\| `(\w+)` \|", table.group(), re.M)


def test_tables_are_those_of_the_code() -> None:
    assert first_column("## tracer.result") == [one.name for one in fields(Provenance)]
    assert first_column("Each `Hop`:") == list(Hop._fields)
    assert first_column("## hive.toml") == list(Settings.model_fields)
    assert first_column("## model.trace\n") == list(real(glasshive.Model.trace).parameters)
    variables = [CONFIG_VARIABLE, *(f"GLASSHIVE_{one.upper()}" for one in Settings.model_fields)]
    assert re.findall(r"^\| `(GLASSHIVE_\w+)` \|", PAGE, re.M) == [
        *variables,
        "GLASSHIVE_CACHE",
        DATA_VARIABLE,
        PASSPHRASE_VARIABLE,
    ]


def test_no_variable_is_left_out() -> None:
    ours = [
        path
        for top in ("src/glasshive", "client", "dht", "peer", "security", "graph")
        for path in (ROOT / top).glob("*.py")
    ]
    named = {
        one for path in ours for one in re.findall(r"GLASSHIVE_[A-Z_]*[A-Z]", path.read_text())
    }
    assert all(f"`{one}`" in PAGE for one in named)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([A-Z]\w+(?:Error|[a-z]))`", PAGE))))
def test_errors_that_it_names_have_pages(name: str) -> None:
    others = {
        "Hop",
        "Model",
        "Profile",
        "Provenance",
        "Relayed",
        "Replaced",
        "Swarm",
        "GraphError",
        "TransportError",
        "GlasshiveError",
        "ModelUnavailableError",
    }
    assert name in others or (ROOT / "docs" / "errors" / f"{name}.md").exists()
