"""The model's module tree as the researcher writes it: `model.model.layers[5].mlp.output`.

A `Module` is a path and what the twin knows of it; it holds no weights. Inside a trace `.output`,
`.input` and `.inputs` are traced tensors of the current invoke, parameters are read-only traced
tensors, and calling a module applies the model's own one to traced values.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, nn

from glasshive.client.errors import NotInATrace, TraceError
from glasshive.client.functional import Cell
from glasshive.client.misfits import array_hint
from glasshive.client.source_lines import at_line, here
from glasshive.client.structures import NamedValues, Parts
from glasshive.client.traced import TracedTensor
from glasshive.graph.errors import GraphError, NotASite, NotYet, ShapeMismatch
from glasshive.graph.graph import IO, Call, LeafPath, Param, Ref, Site
from glasshive.graph.outline import GENERATOR, Leaf, ModuleInfo
from glasshive.graph.tensors import TensorSpec

if TYPE_CHECKING:
    from glasshive.client.model import Model
    from glasshive.client.tracer import Tracer

_SITES = ("output", "input", "inputs")
# What NNsight offers on a model and later releases bring.
_LATER = ("session", "edit", "scan")


class Module:
    """One module of the model, by its Hugging Face path."""

    def __init__(self, model: Model, path: str) -> None:
        # Written past __setattr__, which is for the researcher's assignments.
        self.__dict__.update(_model=model, _path=path)

    @property
    def path(self) -> str:
        """The path, such as `model.layers.5.mlp`; empty for the whole model."""
        return str(self.__dict__["_path"])

    # Sites ----------------------------------------------------------------------------------

    @property
    def output(self) -> Any:
        """What the module returns: a traced tensor, or a tuple or mapping of them.

        What stands in a tuple and is no tensor (a cache, None) is None. Raises NotInATrace or
        NotASite.
        """
        return self._tree("output")

    @output.setter
    def output(self, value: Any) -> None:
        self._set_tree("output", value)

    @property
    def input(self) -> TracedTensor:
        """The module's first tensor argument, positional or by name."""
        return self._tracer().read(self._first_input())

    @input.setter
    def input(self, value: Any) -> None:
        self._tracer().assign(self._first_input(), value)

    @property
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """All arguments: positional ones as a tuple, named ones as a dictionary."""
        tracer = self._tracer()
        info = self._info()
        self._require(info, "input")
        positional: dict[int, Any] = {}
        named: dict[str, Any] = {}
        for leaf in tracer.leaves(self.path, "input"):
            value = tracer.read(Site(self.path, "input", leaf.path))
            first = leaf.path[0]
            target: dict[Any, Any] = positional if isinstance(first, int) else named
            target[first] = _nest(target.get(first), leaf.path[1:], value)
        args = tuple(_as_tuple(positional.get(i)) for i in range(max(positional, default=-1) + 1))
        values = {name: _as_tuple(value) for name, value in named.items()}
        return Parts((Parts(args), NamedValues(values, name=f"{self._at('inputs')}[1]")))

    @inputs.setter
    def inputs(self, value: Any) -> None:
        tracer = self._tracer()
        info = self._info()
        self._require(info, "input")
        if not (isinstance(value, tuple | list) and len(value) == 2):
            raise TraceError(
                f"{self.path}.inputs is assigned a {type(value).__name__}; a pair is wanted, of a "
                "tuple and a dictionary, as reading it gives",
                line=here(),
            )
        args, named = value
        for leaf in tracer.leaves(self.path, "input"):
            given = args if isinstance(leaf.path[0], int) else named
            part = _part(given, leaf.path, f"{self.path}.inputs")
            tracer.assign(Site(self.path, "input", leaf.path), part)

    def skip(self, value: Any) -> None:
        """Do not run the module for this invoke: its output is `value`.

        A tensor, or a tuple whose first part is one for a module that gives a tuple. Sites inside
        the module are errors. Raises NotASite, LateEdit, ImpossibleOrder or ShapeMismatch.
        """
        if isinstance(value, tuple | list) and value:
            value = value[0]
        self._tracer().skip(self.path, value)

    def next(self, steps: int = 1) -> Module:
        """This module, of which sites are from now on those of a later step of the generation."""
        self._tracer().advance(self.path, steps)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> TracedTensor:
        """The model's own module applied to traced values, with edits off.

        Raises ShapeMismatch if the module refuses them, NotASite if it gives no single tensor.
        """
        tracer = self._tracer()
        if kwargs or not args or not all(isinstance(arg, Tensor) for arg in args):
            kinds = [type(arg).__name__ for arg in args] + [f"{name}=" for name in kwargs]
            advice = array_hint(*args) or "; call a part of it, or write the rest with torch"
            raise TraceError(
                f"{self.path}({', '.join(kinds)}): in a trace a module takes tensors by position, "
                f"one at least{advice}",
                line=here(),
            )
        recorder = tracer.sites.recorder
        specs = tuple(TensorSpec(_dtype(arg), tuple(arg.shape)) for arg in args)
        try:
            result = self._model.calls.spec(self.path, specs)
        except GraphError as error:
            at = recorder.at_step if isinstance(error, ShapeMismatch) else ""
            error.args = (f"{at_line()}{error}{at}",)
            raise
        node = recorder.add(Call(self.path, tuple(Ref(recorder.value(arg)) for arg in args)))
        return recorder.traced(node, result)

    # Tree -----------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        path = f"{self.path}.{name}" if self.path else name
        if path in self._model.outline.modules:
            return Module(self._model, path)
        info = self._info()
        if name in info.params:
            return self._parameter(name)
        if not self.path and name in _LATER:
            raise NotYet(
                f"{at_line()}model.{name}(...) is not in this release yet; docs/roadmap.md"
            )
        if name == "save":
            raise TraceError(
                f"{self.path} is a module; save what it gives: .output.save()", line=here()
            )
        near = self._nearest(name)
        raise AttributeError(
            f"{at_line()}{self._name} ({info.kind}) has no module or parameter {name!r}"
            + (f"; did you mean {near}?" if near else "; print(model) shows what there is")
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _SITES:
            raise AttributeError(
                f"{at_line()}{self.path}.{name} cannot be assigned; .output, .input and .inputs "
                "can, and weights are read-only"
            )
        object.__setattr__(self, name, value)

    def __getitem__(self, index: int | slice) -> Any:
        children = self._children()
        if isinstance(index, slice):
            return [Module(self._model, path) for path in children[index]]
        try:
            return Module(self._model, children[index])
        except TypeError:
            raise TypeError(
                f"{at_line()}{self.path} is indexed by {index!r:.40}; a number from 0 to "
                f"{len(children) - 1}, or a slice, is wanted"
            ) from None
        except IndexError:
            raise IndexError(
                f"{at_line()}{self.path} has {len(children)} modules; index {index} is outside"
            ) from None

    def __setitem__(self, index: object, value: object) -> NoReturn:
        raise TraceError(
            f"a module of {self._name} cannot be replaced; assign what it gives "
            f"({self.path}[{index!r:.20}].output = ...), or have it not run with .skip(value)",
            line=here(),
        )

    def named_modules(self) -> Iterator[tuple[str, Module]]:
        """This module and all inside it, with their paths from here, as torch's own gives them."""
        prefix = f"{self.path}." if self.path else ""
        for path in self._model.outline.modules:
            if (path == self.path or path.startswith(prefix)) and path != GENERATOR:
                yield path[len(prefix) :], Module(self._model, path)

    def __len__(self) -> int:
        return len(self._children())

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Module]:
        return (Module(self._model, path) for path in self._children())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Module) and (other.path, other._model) == (self.path, self._model)

    def __hash__(self) -> int:
        return hash((self.path, id(self._model)))

    def __dir__(self) -> list[str]:
        prefix = f"{self.path}." if self.path else ""
        names = {
            path[len(prefix) :].split(".", 1)[0]
            for path in self._model.outline.modules
            if path.startswith(prefix) and path
        }
        return sorted({*object.__dir__(self), *names, *self._info().params})

    def __repr__(self) -> str:
        if self.path == GENERATOR:
            return f"{GENERATOR}: {self._info().kind}, with .output at each step of a generation"
        return f"{self.path or 'model'}: {self._twin_module()!r}"

    # A module is no value -----------------------------------------------------------------------

    def _no_value(self, *others: object) -> NoReturn:
        raise TraceError(
            f"{self._name} is a module, not a value, so it cannot be computed with; take what it "
            "gives (.output) or gets (.input), or call it on a value",
            line=here(),
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __matmul__ = _no_value
    __rmatmul__ = __truediv__ = __rtruediv__ = __floordiv__ = __mod__ = __pow__ = _no_value
    __rpow__ = __neg__ = __abs__ = __lt__ = __le__ = __gt__ = __ge__ = _no_value
    __float__ = __int__ = __and__ = __or__ = __xor__ = __invert__ = _no_value

    @classmethod
    def __torch_function__(
        cls, func: object, types: object, args: Sequence[Any] = (), kwargs: Any = None
    ) -> NoReturn:
        """Called by torch for a function that is given a module. Raises TraceError."""
        given = [*args, *(kwargs or {}).values()]
        flat = [one for arg in given for one in (arg if isinstance(arg, list | tuple) else [arg])]
        next(one for one in flat if isinstance(one, Module))._no_value()

    # ----------------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return self.path or "the model"

    def _nearest(self, name: str) -> str:
        """What may have been meant by a name that is not there: beside it, or elsewhere."""
        known = self._model.outline.modules
        inside = [path.rpartition(".")[2] for path in known if path.rpartition(".")[0] == self.path]
        names = [*(one for one in inside if one), *self._info().params, *_SITES]
        close = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
        elsewhere = [f"model.{path}" for path in known if path.rpartition(".")[2] == name][:2]
        return " or ".join(close or elsewhere)

    def _twin_module(self) -> nn.Module:
        module: nn.Module = self._model.twin.get_submodule(self.path)
        return module

    def _info(self) -> ModuleInfo:
        info: ModuleInfo = self._model.outline.module(self.path)
        return info

    def _children(self) -> list[str]:
        module = self._twin_module()
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            raise TypeError(
                f"{at_line()}{self._name} ({self._info().kind}) is not a list of modules; for what "
                "it gives write .output"
            )
        return [f"{self.path}.{name}" for name, _ in module.named_children()]

    def _tracer(self) -> Tracer:
        from glasshive.client.tracer import current_tracer

        tracer = current_tracer()
        if tracer is None:
            raise NotInATrace(
                f"{at_line()}{self._name} is used outside a trace; open one with "
                "`with model.trace(prompt):`"
            )
        if tracer.model is not self._model:
            raise NotInATrace(
                f"{at_line()}{self._name} of another model ({self._model.name}) is used in "
                f"{tracer.title}; a trace is of one model: save what you need, end this block, and "
                "use it in a trace of the other model"
            )
        return tracer

    def _parameter(self, name: str) -> TracedTensor:
        recorder = self._tracer().sites.recorder
        spec = self._model.outline.param(self.path, name)

        def refuse(cell: Cell) -> None:
            raise TraceError(
                f"{self.path}.{name} is edited in place, but weights are read-only; call .clone() "
                "on it first, or edit what the module gives (.output)",
                line=here(),
            )

        cell = recorder.new_cell(recorder.add(Param(self.path, name)), spec, on_mutate=refuse)
        return recorder.tensor_of(cell)

    def _require(self, info: ModuleInfo, io: IO) -> None:
        try:
            self._model.outline.event(Site(info.path, io))
        except NotASite as error:
            raise NotASite(f"{at_line()}{error}") from None

    def _leaves(self, io: IO) -> tuple[Leaf, ...]:
        """The tensors at this site in the current invoke; at least one. Raises NotASite."""
        self._require(self._info(), io)
        leaves = self._tracer().leaves(self.path, io)
        if not leaves:
            raise NotASite(
                f"{at_line()}{self.path}.{io} holds no tensor whose rows can be told apart"
            )
        return leaves

    def _first_input(self) -> Site:
        return Site(self.path, "input", self._leaves("input")[0].path)

    def _tree(self, io: IO) -> Any:
        tracer = self._tracer()
        leaves = self._leaves(io)
        parts = self._info().output_parts
        tree: Any = None
        for leaf in leaves:
            tree = _nest(tree, leaf.path, tracer.read(Site(self.path, io, leaf.path)))
        where = self._at(io)
        if io == "output" and parts:
            made = Parts(_as_tuple(tree.get(index)) for index in range(parts))
            notes = tracer.notes
            made.name, made.on_none = where, lambda index: notes.add(self._why_none(index))
            return made
        if io == "output" and self._info().output_names and isinstance(tree, dict):
            values = {name: _as_tuple(value) for name, value in tree.items()}
            return NamedValues(values, self._info().output_names, where)
        return _as_tuple(tree)

    def _at(self, io: str) -> str:
        return f"{self.path}.{io}" if self.path else f"the whole model's {io}"

    def _why_none(self, index: int) -> str:
        """What to say of a part of the output that is None, should it be used."""
        why = "the model gives no tensor there"
        attention = getattr(self._model.config, "_attn_implementation", None)
        if attention not in (None, "eager") and "attention" in self._info().kind.lower():
            why = (
                f"with {attention} attention no weights are made; hosts with --attention eager, or "
                "glasshive.local(..., attention='eager'), make them"
            )
        return f"{at_line()}{self._at('output')}[{index}] is None: {why}"

    def _set_tree(self, io: IO, value: Any) -> None:
        tracer = self._tracer()
        leaves = self._leaves(io)
        if len(leaves) == 1 and leaves[0].path == ():
            tracer.assign(Site(self.path, io, ()), value)
            return
        if not isinstance(value, tuple | list | dict):
            first = leaves[0].path[0]
            kind = "tuple" if isinstance(first, int) else f"dictionary with {first!r}"
            raise TraceError(
                f"{self._at(io)} is a {kind}, "
                f"but a {type(value).__name__} is assigned; assign to a part of it, such as "
                f"{self._at(io)}[{first!r}][:] = ..., or give a whole {kind}",
                line=here(),
            )
        for leaf in leaves:
            part = _part(value, leaf.path, self._at(io))
            tracer.assign(Site(self.path, io, leaf.path), part)


def _part(tree: Any, path: LeafPath, where: str) -> Any:
    """What lies at `path` in `tree`. Raises TraceError if there is nothing."""
    part = tree
    for step in path:
        try:
            part = part[step]
        except (KeyError, IndexError, TypeError):
            raise TraceError(
                f"what is assigned to {where} has no part {step!r}", line=here()
            ) from None
    return part


def _nest(tree: Any, path: LeafPath, value: Any) -> Any:
    """`tree` (dictionaries by index or name) with `value` put in at `path`."""
    if not path:
        return value
    inner = {} if tree is None else tree
    inner[path[0]] = _nest(inner.get(path[0]), path[1:], value)
    return inner


def _as_tuple(tree: Any) -> Any:
    """Dictionaries by index as tuples, with None where nothing was put in; the rest by name."""
    if not isinstance(tree, dict):
        return tree
    if all(isinstance(key, int) for key in tree):
        return Parts(_as_tuple(tree.get(index)) for index in range(max(tree) + 1))
    return NamedValues({key: _as_tuple(value) for key, value in tree.items()})


def _dtype(tensor: Tensor) -> Any:
    from glasshive.graph.kernels import from_torch_dtype

    return from_torch_dtype(tensor.dtype)
