"""The closed table of ops: names, signatures, cost rules and flags, written by hand.

- A name is the ATen packet's name; where overloads differ in what they give, each has its own name
  (`max` is one number, `max_dim` two tensors, `maximum` elementwise).
- A node carries every argument of the signature, in order: there are no defaults on the wire.
  The defaults here serve whoever records a graph (`OpSpec.complete`).
- No op mutates, writes to a given tensor, reads uninitialised memory, sees strides, storage or a
  device, or has an output shape that depends on data. Random ops carry a seed.
- An op with several outputs gives a group; `pick(group, index)` takes one tensor out of it, and
  nothing else may name the group.

What an op computes is in kernels_*.py, under the same headings; kernels.py runs it. A whitelist can
narrow this table and never widen it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, TypeAlias, get_args

from glasshive.graph.dtypes import DType
from glasshive.graph.errors import UnknownOp
from glasshive.graph.graph import Arg, Ref
from glasshive.graph.tensors import MAX_RANK

Kind: TypeAlias = Literal[
    "value",  # a Ref
    "operand",  # a Ref or a scalar
    "values",  # a tuple of Refs, at least one
    "optional_values",  # a tuple of Refs and None, at least one Ref
    "scalar",  # int, float or bool
    "int",  # signed, 64 bits
    "ints",  # a tuple of at most MAX_INTS ints
    "float",
    "bool",
    "dtype",
    "choice",  # one of a closed set of words
    "seed",  # an int, 0 or more
]
CostRule: TypeAlias = Literal[
    "view",  # nothing is computed; the result may share the input's memory
    "cast",  # one step an output element; the result may share the input's memory
    "elementwise",  # one step an output element
    "move",  # one step an output element, perhaps by way of a copy
    "roll",  # a move for each shift
    "pick",  # 8 steps an output element: memory is read in no order
    "divide",  # 1,024 steps an output element: as many divisions as two ints may need
    "special",  # 16 steps an output element: a transcendental function
    "reduce",  # one step an input element
    "normalise",  # 8 steps an input element
    "scan",  # 4 steps an input element
    "sort",  # 4 log2(n) steps an input element
    "pairs",  # every element of one input against every element of another
    "matmul",
    "distances",  # 3 steps for each two elements compared, or 16 if the difference is powered
    "convolution",
    "attention",
    "cubic",  # a decomposition of square or rectangular matrices
    "fourier",
]

INT_MIN: Final = -(2**63)
INT_MAX: Final = 2**63 - 1
# Sizes, axes or shifts, one for each axis, or two where an axis is padded on both sides. Some ops
# make a copy of their argument for each, so a longer list would be work that no bill knows of.
MAX_INTS: Final = 2 * MAX_RANK


class _Required:
    """The default of a parameter that has none."""

    def __repr__(self) -> str:
        return "required"


REQUIRED: Final = _Required()


@dataclass(frozen=True, slots=True)
class Parameter:
    """One argument of an op. An `optional` one may be None."""

    name: str
    kind: Kind
    optional: bool = False
    choices: tuple[str, ...] = ()
    default: Arg | _Required = REQUIRED

    def accepts(self, arg: Arg) -> bool:
        """Whether `arg` is of this parameter's kind: a bool is no int, an int is no float."""
        kind = self.kind
        if type(arg) is Ref:
            return kind == "value" or kind == "operand"
        if arg is None:
            return self.optional
        if kind == "value":
            return False
        if kind == "operand" or kind == "scalar":
            return _is_scalar(arg)
        if kind == "int":
            return _is_int(arg)
        if kind == "seed":
            return _is_int(arg, low=0)
        if kind == "float":
            return type(arg) is float
        if kind == "bool":
            return type(arg) is bool
        if kind == "dtype":
            return type(arg) is DType
        if kind == "choice":
            return type(arg) is str and arg in self.choices
        if type(arg) is not tuple:
            return False
        if kind == "ints":
            return len(arg) <= MAX_INTS and all(map(_is_int, arg))
        if kind == "values":
            return bool(arg) and all(type(item) is Ref for item in arg)
        return any(type(item) is Ref for item in arg) and all(
            item is None or type(item) is Ref for item in arg
        )

    @property
    def wanted(self) -> str:
        """What this parameter takes, in words."""
        words = _IN_WORDS[self.kind]
        if self.choices:
            words = " or ".join(self.choices)
        return f"{words}, or null" if self.optional else words


@dataclass(frozen=True, slots=True)
class OpSpec:
    """One op of the table. `outputs` > 1 means that its value is a group for `pick`.

    `guarded`: numbers in its tensors, such as a bad index, can end an accelerator's process, so
    they are looked at before it runs there.
    """

    name: str
    params: tuple[Parameter, ...]
    cost: CostRule
    outputs: int = 1
    random: bool = False
    differentiable: bool = True
    guarded: bool = False
    version: int = 1

    def complete(
        self, args: Sequence[Arg], kwargs: Mapping[str, Arg] | None = None
    ) -> tuple[Arg, ...]:
        """All arguments in order, defaults filled in. Raises UnknownOp if they do not fit."""
        given = dict(kwargs or {})
        if len(args) > len(self.params):
            raise UnknownOp(f"{self.signature} got {len(args)} arguments")
        full: list[Arg] = list(args)
        for param in self.params[len(args) :]:
            arg = given.pop(param.name, param.default)
            if isinstance(arg, _Required):
                raise UnknownOp(f"{self.signature} got no {param.name}")
            full.append(arg)
        if given:
            raise UnknownOp(f"{self.signature} got {', '.join(given):.80}, which it has not")
        check_args(self, tuple(full))
        return tuple(full)

    @property
    def signature(self) -> str:
        """The op as text, for messages."""
        return f"{self.name}({', '.join(param.name for param in self.params)})"


_IN_WORDS: Mapping[Kind, str] = {
    "value": "a value of the graph",
    "operand": "a value of the graph or a number",
    "values": "a list of values of the graph, at least one",
    "optional_values": "a list of values of the graph and nulls, at least one value",
    "scalar": "an int, float or bool",
    "int": "an int of 64 bits",
    "ints": f"a list of at most {MAX_INTS} ints of 64 bits",
    "float": "a float",
    "bool": "a bool",
    "dtype": "a dtype",
    "choice": "a word",
    "seed": "an int from 0 to 2**63 - 1",
}


def _is_int(arg: object, low: int = INT_MIN) -> bool:
    return type(arg) is int and low <= arg <= INT_MAX


def _is_scalar(arg: object) -> bool:
    return type(arg) is float or type(arg) is bool or _is_int(arg)


def find_op(name: str) -> OpSpec:
    """The op called `name`. Raises UnknownOp with the nearest names."""
    spec = OPS.get(name)
    if spec is None:
        near = nearest(name)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UnknownOp(f"there is no op {name[:64]!r} in the table{hint}")
    return spec


def nearest(name: str) -> tuple[str, ...]:
    """At most three names of the table that look like `name`."""
    return tuple(difflib.get_close_matches(name[:64], OPS, n=3, cutoff=0.6))


def check_args(spec: OpSpec, args: tuple[Arg, ...]) -> None:
    """Return if `args` are a full set of arguments for `spec`. Raises UnknownOp if not."""
    if len(args) != len(spec.params):
        raise UnknownOp(
            f"{spec.signature} got {len(args)} arguments, but {len(spec.params)} are wanted"
        )
    for param, arg in zip(spec.params, args, strict=True):
        if not param.accepts(arg):
            raise UnknownOp(
                f"{spec.signature} got {_in_words(arg)} for {param.name}; {param.wanted} is wanted"
            )
    if Ref not in map(type, args) and "operand" in {param.kind for param in spec.params}:
        raise UnknownOp(f"{spec.signature} got numbers only; one value of the graph is wanted")


def _in_words(arg: Arg) -> str:
    if arg is None:
        return "null"
    if isinstance(arg, Ref):
        return "a value"
    if isinstance(arg, tuple):
        return f"a list of {len(arg)}"
    if isinstance(arg, DType):
        return f"dtype {arg.value}"
    if isinstance(arg, str):
        return f"the word {arg[:40]!r}"
    return f"the {type(arg).__name__} {arg if not isinstance(arg, int) else _short(arg)}"


def _short(number: int) -> str:
    return str(number) if abs(number) < 10**20 else "beyond 64 bits"


_TABLE: dict[str, OpSpec] = {}
_KINDS: Final = frozenset(get_args(Kind))
_COSTS: Final = frozenset(get_args(CostRule))


def _op(
    names: str,
    signature: str,
    cost: CostRule,
    *,
    outputs: int = 1,
    random: bool = False,
    differentiable: bool = True,
    guarded: bool = False,
    version: int = 1,
) -> None:
    """Put ops of one signature into the table: `name:kind`, then `?` if optional, or `=default`.

    Alternatives between bars, `mode:mean|sum|none=mean`, are a choice.
    """
    params = tuple(_parameter(text) for text in signature.split())
    for name in names.split():
        if name in _TABLE or cost not in _COSTS:
            raise ValueError(f"op {name!r} stands twice in the table, or has no cost rule")
        _TABLE[name] = OpSpec(name, params, cost, outputs, random, differentiable, guarded, version)


def _parameter(text: str) -> Parameter:
    name, _, rest = text.partition(":")
    kind, equals, default_text = rest.partition("=")
    optional = kind.endswith("?")
    kind = kind.removesuffix("?")
    choices = tuple(kind.split("|")) if "|" in kind else ()
    default: Arg | _Required = None if optional else REQUIRED
    if equals:
        default = default_text if choices else _literal(default_text)
    for known in get_args(Kind):
        if known == ("choice" if choices else kind):
            return Parameter(name, known, optional, choices, default)
    raise ValueError(f"{text!r} is no parameter")


def _literal(text: str) -> Arg:
    if text in ("True", "False"):
        return text == "True"
    if text == "()":
        return ()
    return float(text) if "." in text or "e" in text else int(text)


# One line, one signature.
# fmt: off

# Parts of a group ----------------------------------------------------------------------------

_op("pick", "group:value index:int", "view")

# Shapes and views ----------------------------------------------------------------------------

_op("reshape", "a:value shape:ints", "cast")
_op("expand", "a:value shape:ints", "view")
_op("permute", "a:value dims:ints", "view")
_op("slice", "a:value dim:int start:int stop:int step:int=1", "view")
_op("select", "a:value dim:int index:int", "view")
_op("diagonal", "a:value offset:int=0 dim1:int=0 dim2:int=1", "view")
_op("unfold", "a:value dim:int size:int step:int", "view")
_op("view_as_real view_as_complex", "a:value", "view")
_op("detach", "a:value", "view", differentiable=False)
_op("clone", "a:value", "elementwise")
_op("to", "a:value dtype:dtype", "cast")

_op("select_scatter", "a:value src:value dim:int index:int", "move")
_op("slice_scatter", "a:value src:value dim:int start:int stop:int step:int=1", "move")
_op("diagonal_scatter", "a:value src:value offset:int=0 dim1:int=0 dim2:int=1", "move")

_op("cat stack", "tensors:values dim:int=0", "move")
_op("repeat", "a:value repeats:ints", "move")
_op("flip", "a:value dims:ints", "move")
_op("roll", "a:value shifts:ints dims:ints=()", "roll")
_op("tril triu", "a:value diagonal:int=0", "move")
_op("diag_embed", "a:value offset:int=0 dim1:int=-2 dim2:int=-1", "move")
_op("constant_pad_nd", "a:value pad:ints value:scalar=0", "move")

# New tensors ---------------------------------------------------------------------------------

_op("full", "shape:ints value:scalar dtype:dtype", "elementwise", differentiable=False)
_op("full_like", "a:value value:scalar dtype:dtype?", "elementwise", differentiable=False)
_op("zeros_like ones_like", "a:value dtype:dtype?", "elementwise", differentiable=False)
_op("arange", "start:scalar stop:scalar step:scalar dtype:dtype",
    "elementwise", differentiable=False)
_op("linspace", "start:scalar stop:scalar steps:int dtype:dtype",
    "elementwise", differentiable=False)
_op("eye", "n:int m:int dtype:dtype", "elementwise", differentiable=False)
_op("one_hot", "a:value classes:int", "move", differentiable=False, guarded=True)

# Random numbers ------------------------------------------------------------------------------

_op("rand_like randn_like", "a:value dtype:dtype? seed:seed",
    "special", random=True, differentiable=False)
_op("randint_like", "a:value low:int high:int dtype:dtype? seed:seed",
    "special", random=True, differentiable=False)
_op("bernoulli", "a:value p:float? seed:seed", "special", random=True, differentiable=False)
_op("multinomial", "a:value samples:int replacement:bool=False seed:seed",
    "sort", random=True, differentiable=False)
_op("normal", "a:value mean:float=0.0 std:float=1.0 seed:seed",
    "special", random=True, differentiable=False)
_op("uniform", "a:value low:float=0.0 high:float=1.0 seed:seed",
    "special", random=True, differentiable=False)
_op("exponential", "a:value rate:float=1.0 seed:seed", "special", random=True, differentiable=False)
_op("dropout", "a:value p:float seed:seed", "special", random=True)

# One tensor, element by element --------------------------------------------------------------

_op("abs neg reciprocal relu frac sgn", "a:value", "elementwise")
_op("ceil floor trunc sign", "a:value", "elementwise")
_op("round", "a:value decimals:int=0", "elementwise")
_op("real imag conj positive", "a:value", "view")
_op("isnan isinf isfinite isposinf isneginf signbit logical_not bitwise_not", "a:value",
    "elementwise", differentiable=False)
_op("acos acosh angle asin asinh atan atanh cos cosh digamma erf erfc erfinv exp exp2 expm1 "
    "hardsigmoid hardswish i0 lgamma log log10 log1p log2 log_sigmoid mish rsqrt selu sigmoid "
    "silu sin sinc sinh sqrt tan tanh",
    "a:value", "special")
_op("logit", "a:value eps:float?", "special")
_op("nan_to_num", "a:value nan:float? posinf:float? neginf:float?", "elementwise")
_op("gelu", "a:value approximate:none|tanh=none", "special")
_op("elu", "a:value alpha:scalar=1 scale:scalar=1 input_scale:scalar=1", "special")
_op("celu", "a:value alpha:scalar=1.0", "special")
_op("leaky_relu", "a:value slope:scalar=0.01", "elementwise")
_op("hardtanh", "a:value low:scalar=-1 high:scalar=1", "elementwise")
_op("hardshrink softshrink", "a:value width:scalar=0.5", "elementwise")
_op("threshold", "a:value threshold:scalar value:scalar", "elementwise")
_op("softplus", "a:value beta:scalar=1 threshold:scalar=20", "special")
_op("glu", "a:value dim:int=-1", "special")
_op("polar complex", "a:value b:value", "special")

# Two or three tensors, element by element ----------------------------------------------------

_op("add sub rsub", "a:value b:operand alpha:scalar=1", "elementwise")
_op("mul", "a:value b:operand", "elementwise")
_op("div", "a:value b:operand rounding:none|trunc|floor=none", "elementwise")
_op("pow xlogy", "a:operand b:operand", "special")
_op("remainder", "a:operand b:operand", "elementwise")
_op("fmod", "a:value b:operand", "elementwise")
_op("copysign", "a:value b:operand", "elementwise")
_op("maximum minimum fmax fmin", "a:value b:value", "elementwise")
_op("atan2 hypot logaddexp logaddexp2", "a:value b:value", "special")
_op("heaviside", "a:value b:value", "elementwise", differentiable=False)
_op("gcd lcm", "a:value b:value", "divide", differentiable=False)
_op("eq ne lt le gt ge", "a:value b:operand", "elementwise", differentiable=False)
_op("logical_and logical_or logical_xor", "a:value b:value", "elementwise", differentiable=False)
_op("bitwise_and bitwise_or bitwise_xor bitwise_left_shift bitwise_right_shift",
    "a:operand b:operand", "elementwise", differentiable=False)
_op("lerp", "a:value b:value weight:operand", "elementwise")
_op("addcmul addcdiv", "a:value b:value c:value scale:scalar=1", "elementwise")
_op("clamp", "a:value low:operand? high:operand?", "elementwise")
_op("where", "condition:value a:operand b:operand", "elementwise")
_op("masked_fill", "a:value mask:value value:operand", "elementwise")
_op("masked_scatter", "a:value mask:value src:value", "scan", guarded=True)
_op("prelu", "a:value weight:value", "elementwise")

# Reductions ----------------------------------------------------------------------------------

_op("sum mean nansum", "a:value dims:ints? keepdim:bool=False dtype:dtype?", "reduce")
_op("prod", "a:value dim:int? keepdim:bool=False dtype:dtype?", "reduce")
_op("all any", "a:value dims:ints? keepdim:bool=False", "reduce", differentiable=False)
_op("amax amin", "a:value dims:ints=() keepdim:bool=False", "reduce")
_op("logsumexp", "a:value dims:ints keepdim:bool=False", "normalise")
_op("max min", "a:value", "reduce")
_op("median nanmedian", "a:value", "sort")
_op("argmax argmin", "a:value dim:int? keepdim:bool=False", "reduce", differentiable=False)
_op("max_dim min_dim", "a:value dim:int keepdim:bool=False", "reduce", outputs=2)
_op("median_dim nanmedian_dim mode", "a:value dim:int=-1 keepdim:bool=False", "sort", outputs=2)
_op("aminmax", "a:value dim:int? keepdim:bool=False", "reduce", outputs=2)
_op("var std", "a:value dims:ints? correction:scalar=1 keepdim:bool=False", "normalise")
_op("var_mean std_mean", "a:value dims:ints? correction:scalar=1 keepdim:bool=False",
    "normalise", outputs=2)
_op("vector_norm", "a:value ord:scalar=2 dims:ints? keepdim:bool=False dtype:dtype?", "normalise")
_op("count_nonzero", "a:value dims:ints?", "reduce", differentiable=False)
_op("trace", "a:value", "reduce")
_op("histc", "a:value bins:int=100 low:scalar=0 high:scalar=0", "sort", differentiable=False)

# Along a dimension ---------------------------------------------------------------------------

_op("softmax log_softmax", "a:value dim:int", "normalise")
_op("cumsum cumprod", "a:value dim:int dtype:dtype?", "scan")
_op("logcumsumexp", "a:value dim:int", "normalise")
_op("cummax cummin", "a:value dim:int", "scan", outputs=2)
_op("sort", "a:value dim:int=-1 descending:bool=False stable:bool=False", "sort", outputs=2)
_op("topk", "a:value k:int dim:int=-1 largest:bool=True sorted:bool=True", "sort", outputs=2)
_op("kthvalue", "a:value k:int dim:int=-1 keepdim:bool=False", "sort", outputs=2)
_op("renorm", "a:value p:scalar dim:int maxnorm:scalar", "normalise")

# Picking and placing by index ----------------------------------------------------------------

_op("index", "a:value indices:optional_values", "pick", guarded=True)
_op("index_put", "a:value indices:optional_values src:value accumulate:bool=False", "scan",
    guarded=True)
_op("index_select", "a:value dim:int index:value", "pick", guarded=True)
_op("index_add", "a:value dim:int index:value src:value alpha:scalar=1", "scan", guarded=True)
_op("index_copy", "a:value dim:int index:value src:value", "scan", guarded=True)
_op("index_fill", "a:value dim:int index:value value:operand", "scan", guarded=True)
_op("gather", "a:value dim:int index:value", "pick", guarded=True)
_op("scatter", "a:value dim:int index:value src:operand", "scan", guarded=True)
_op("scatter_add", "a:value dim:int index:value src:value", "scan", guarded=True)
_op("scatter_reduce",
    "a:value dim:int index:value src:value reduce:sum|prod|mean|amax|amin "
    "include_self:bool=True", "scan", guarded=True)
_op("take", "a:value index:value", "pick", guarded=True)
_op("put", "a:value index:value src:value accumulate:bool=False", "scan", guarded=True)
_op("embedding", "weight:value indices:value", "pick", guarded=True)
_op("isin", "a:value test:operand invert:bool=False", "pairs", differentiable=False)
_op("searchsorted", "sorted:value a:operand right:bool=False", "sort", differentiable=False)
_op("bucketize", "a:operand boundaries:value right:bool=False", "sort", differentiable=False)

# Matrices ------------------------------------------------------------------------------------

_op("mm bmm mv dot", "a:value b:value", "matmul")
_op("addmm addmv baddbmm", "c:value a:value b:value beta:scalar=1 alpha:scalar=1", "matmul")
_op("addr", "c:value a:value b:value beta:scalar=1 alpha:scalar=1", "elementwise")
_op("cdist", "a:value b:value p:float=2.0", "distances")
_op("linalg_cross", "a:value b:value dim:int=-1", "normalise")
_op("linalg_inv linalg_det", "a:value", "cubic")
_op("linalg_pinv", "a:value atol:float? rtol:float? hermitian:bool=False", "cubic")
_op("linalg_solve", "a:value b:value left:bool=True", "cubic")
_op("linalg_solve_triangular", "a:value b:value upper:bool left:bool=True unitriangular:bool=False",
    "cubic")
_op("linalg_cholesky", "a:value upper:bool=False", "cubic")
_op("linalg_slogdet", "a:value", "cubic", outputs=2)
_op("linalg_qr", "a:value mode:reduced|complete|r=reduced", "cubic", outputs=2)
_op("linalg_eigh", "a:value uplo:L|U=L", "cubic", outputs=2)
_op("linalg_eigvalsh", "a:value uplo:L|U=L", "cubic")
_op("linalg_svd", "a:value full_matrices:bool=True", "cubic", outputs=3)
_op("linalg_svdvals", "a:value", "cubic")

# Layers --------------------------------------------------------------------------------------

_op("sdpa", "q:value k:value v:value mask:value? causal:bool=False scale:float? grouped:bool=False",
    "attention")
_op("layer_norm", "a:value shape:ints weight:value? bias:value? eps:float=1e-5", "normalise")
_op("rms_norm", "a:value shape:ints weight:value? eps:float?", "normalise")
_op("group_norm", "a:value groups:int weight:value? bias:value? eps:float=1e-5", "normalise")
_op("batch_norm", "a:value weight:value? bias:value? mean:value var:value eps:float=1e-5",
    "normalise")
_op("convolution",
    "a:value weight:value bias:value? stride:ints padding:ints dilation:ints "
    "transposed:bool=False output_padding:ints=() groups:int=1", "convolution")

# Losses --------------------------------------------------------------------------------------

_op("mse_loss soft_margin_loss", "a:value target:value reduction:none|mean|sum=mean", "normalise")
_op("huber_loss", "a:value target:value reduction:none|mean|sum=mean delta:float=1.0", "normalise")
_op("smooth_l1_loss", "a:value target:value reduction:none|mean|sum=mean beta:float=1.0",
    "normalise")
_op("nll_loss",
    "a:value target:value weight:value? reduction:none|mean|sum=mean ignore_index:int=-100",
    "normalise", guarded=True)
_op("binary_cross_entropy", "a:value target:value weight:value? reduction:none|mean|sum=mean",
    "normalise", guarded=True)
_op("binary_cross_entropy_with_logits",
    "a:value target:value weight:value? pos_weight:value? reduction:none|mean|sum=mean",
    "normalise")

# Fourier transforms --------------------------------------------------------------------------

_op("fft_r2c", "a:value dims:ints norm:none|root|full=none onesided:bool=True", "fourier")
_op("fft_c2c", "a:value dims:ints norm:none|root|full=none forward:bool=True", "fourier")
_op("fft_c2r", "a:value dims:ints norm:none|root|full=none last_size:int", "fourier")

# fmt: on


OPS: Final[Mapping[str, OpSpec]] = MappingProxyType(_TABLE)
