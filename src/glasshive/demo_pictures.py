"""The demo's two pictures, as PNG: the logit lens and the patching heat map.

matplotlib is part of `glasshive[demo]` and is imported when a picture is drawn. Nothing of
pyplot's process-wide state is touched: each picture has its own figure and Agg canvas.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from glasshive.demo_oracle import LensResult, PatchingResult

_DOTS_PER_INCH = 130
_FONT = "DejaVu Sans"  # the font that comes with matplotlib
_INK = "#1f2430"
_FAINT = "#6b7280"
_PAPER = "#ffffff"
_ACCENT = "#f97316"
_MARGIN_INCHES = 0.16
_CELL_HEIGHT_INCHES = 0.27
_TOKEN_CHARS = 12
_LABEL_EVERY_LAYERS = 2


def logit_lens_png(result: LensResult, path: Path) -> None:
    """Writes the lens: layers upwards, positions across, each cell its top token.

    The colour of a cell is the probability of its token; a frame holds the last layers of a
    position that all say what the model ends up saying. Raises `ModuleNotFoundError` without
    matplotlib and `OSError` if `path` can't be written.
    """
    layers, shown = result.probabilities.shape
    figure = _figure(2.4 + 1.15 * shown, 2.1 + _CELL_HEIGHT_INCHES * layers)
    axes = figure.add_subplot()
    image = axes.imshow(
        result.probabilities.numpy(), cmap="YlGnBu", vmin=0.0, vmax=1.0, **_image_style()
    )
    for layer, tokens in enumerate(result.top_tokens):
        for position, token in enumerate(tokens):
            probability = result.probabilities[layer, position].item()
            axes.text(
                position,
                layer,
                token_label(token),
                ha="center",
                va="center",
                fontsize=9,
                color=_PAPER if probability > 0.55 else _INK,
                alpha=0.45 + 0.55 * min(1.0, 2 * probability),
                fontweight="bold" if layer == layers - 1 else "normal",
                parse_math=False,
            )
    _grid(axes, layers, shown)
    _frame_settled(axes, result.top_tokens)
    _layer_labels(axes, layers)
    _token_labels(axes, result.tokens)
    axes.set_xlabel("token read at this position", color=_FAINT, fontsize=9.5, labelpad=8)
    _titles(
        axes,
        "Logit lens: the next token, as each layer would say it",
        [
            f"“{printable(result.spec.prompt)}” → {token_label(result.top_tokens[-1][-1])}",
            "framed: from here up, the layers agree with the model's final answer",
        ],
    )
    _colour_bar(figure, axes, image, "probability of the token shown")
    _write(figure, path)


def patching_png(result: PatchingResult, path: Path) -> None:
    """Writes the sweep: layers upwards, positions across, the colour what a patch restored.

    The scale diverges around 0, the corrupted prompt's logit difference; 1 is the clean prompt's.
    A position where the prompts differ shows both tokens. Raises like `logit_lens_png`.
    """
    layers, positions = result.restored.shape
    reach = max(1.0, result.restored.abs().max().item())
    figure = _figure(3.0 + 0.62 * positions, 2.7 + _CELL_HEIGHT_INCHES * layers)
    axes = figure.add_subplot()
    image = axes.imshow(
        result.restored.numpy(), cmap="RdBu", vmin=-reach, vmax=reach, **_image_style()
    )
    for layer in range(layers):
        for position in range(positions):
            value = result.restored[layer, position].item()
            if abs(value) >= 0.05:
                axes.text(
                    position,
                    layer,
                    _decimal(value),
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    color=_PAPER if abs(value) > 0.6 * reach else _INK,
                )
    _grid(axes, layers, positions)
    _layer_labels(axes, layers)
    _token_labels(axes, result.tokens, result.corrupted_tokens)
    axes.set_xlabel("position patched", color=_FAINT, fontsize=9.5, labelpad=8)
    spec = result.spec
    answer, distractor = token_label(spec.answer), token_label(spec.distractor)
    _titles(
        axes,
        "Activation patching: which activation carries the answer?",
        [
            f"clean “{printable(spec.clean)}” → {answer}   "
            f"(logit difference {_signed(result.clean_difference)})",
            f"corrupted “{printable(spec.corrupted)}” → {distractor}   "
            f"(logit difference {_signed(result.corrupted_difference)})",
        ],
    )
    _colour_bar(
        figure,
        axes,
        image,
        f"restored logit difference, {answer} − {distractor}\n(0 = corrupted, 1 = clean)",
    )
    _write(figure, path)


def token_label(token: str) -> str:
    """A token as a short label: no leading space, and white space by a visible sign."""
    named = {"": "∅", "\n": "⏎", "\n\n": "⏎⏎", "\t": "⇥"}
    if token in named:
        return named[token]
    if token.isspace():
        return "␣" if len(token) == 1 else f"␣×{len(token)}"
    text = printable(token.removeprefix(" "))
    return text if len(text) <= _TOKEN_CHARS else text[: _TOKEN_CHARS - 1] + "…"


def printable(text: str) -> str:
    """The text with every character that the pictures' font lacks shown as a box."""
    charmap = _font_characters()
    return "".join(
        "⏎" if letter == "\n" else letter if ord(letter) in charmap else "□" for letter in text
    )


def _decimal(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


# --- drawing --------------------------------------------------------------------------------------


@cache
def _font_characters() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties(family=_FONT))).get_charmap())


def _figure(width_inches: float, height_inches: float) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(
        figsize=(width_inches, height_inches),
        dpi=_DOTS_PER_INCH,
        facecolor=_PAPER,
        layout=ConstrainedLayoutEngine(w_pad=_MARGIN_INCHES, h_pad=_MARGIN_INCHES),
    )


def _image_style() -> dict[str, Any]:
    return {"aspect": "auto", "origin": "lower", "interpolation": "nearest"}


def _grid(axes: Axes, layers: int, positions: int) -> None:
    """White lines between the cells, no frame, no tick marks."""
    axes.set_xticks([at + 0.5 for at in range(positions - 1)], minor=True)
    axes.set_yticks([at + 0.5 for at in range(layers - 1)], minor=True)
    axes.grid(which="minor", color=_PAPER, linewidth=1.1)
    axes.tick_params(which="both", length=0, colors=_INK)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _layer_labels(axes: Axes, layers: int) -> None:
    ticks = list(range(0, layers, _LABEL_EVERY_LAYERS))
    if layers - 1 not in ticks:
        ticks.append(layers - 1)
    axes.set_yticks(ticks, [str(layer) for layer in ticks], fontsize=9)
    axes.set_ylabel("layer", color=_FAINT, fontsize=9.5)


def _token_labels(
    axes: Axes, tokens: tuple[str, ...], others: tuple[str, ...] | None = None
) -> None:
    labels = [token_label(token) for token in tokens]
    differ: list[int] = []
    if others is not None:
        for at, (token, other) in enumerate(zip(tokens, others, strict=True)):
            if token != other:
                labels[at] = f"{token_label(token)}\n({token_label(other)})"
                differ.append(at)
    axes.set_xticks(range(len(labels)), labels, fontsize=9.5, parse_math=False)
    for at in differ:
        axes.get_xticklabels()[at].set_fontweight("bold")


def _frame_settled(axes: Axes, top_tokens: tuple[tuple[str, ...], ...]) -> None:
    """A frame around each position's topmost run of layers that name the final token."""
    from matplotlib.patches import Rectangle

    layers = len(top_tokens)
    for position, final in enumerate(top_tokens[-1]):
        first = layers - 1
        while first > 0 and top_tokens[first - 1][position] == final:
            first -= 1
        axes.add_patch(
            Rectangle(
                (position - 0.47, first - 0.45),
                0.94,
                layers - first - 0.1,
                fill=False,
                edgecolor=_ACCENT,
                linewidth=2.2,
            )
        )


def _titles(axes: Axes, title: str, below: list[str]) -> None:
    axes.set_title(
        title, loc="left", fontsize=14, fontweight="bold", color=_INK, pad=16 + 15 * len(below)
    )
    axes.annotate(
        "\n".join(below),
        xy=(0, 1),
        xycoords="axes fraction",
        xytext=(0, 9),
        textcoords="offset points",
        ha="left",
        va="bottom",
        fontsize=10,
        linespacing=1.45,
        color=_FAINT,
        parse_math=False,
    )


def _colour_bar(figure: Figure, axes: Axes, image: Any, label: str) -> None:
    bar = figure.colorbar(image, ax=axes, fraction=0.035, pad=0.02, aspect=32)
    bar.set_label(label, fontsize=9.5, color=_FAINT, labelpad=8)
    bar.ax.tick_params(labelsize=9, length=0, colors=_INK)
    bar.outline.set_visible(False)


def _write(figure: Figure, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    # Whatever the user's rcParams say: the labels were checked against this font's characters.
    for axes in figure.axes:
        axes.tick_params(which="both", labelfontfamily=_FONT)
    for text in figure.findobj(Text):
        text.set_fontfamily(_FONT)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.print_png(path, metadata={"Software": "glasshive"})
