"""Pictures of a learned merge: a heat map of its coefficients, and its loss curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmerge.merging.candidate import Provenance

COEFFICIENTS = "coefficients.png"
LOSSES = "losses.png"
MOST_INCHES = 60  # longest side of a picture with many domains or layers
SMOOTHED = 25  # steps of the running mean, drawn over the losses of single steps


def draw_learned(folder: Path, provenance: Provenance) -> None:
    """Write ``coefficients.png`` (domain × layer) and ``losses.png`` beside a learned merge; nothing for other merges.

    A searched merge has no losses, and coefficients only if it is linear.

    Args:
        folder: folder of the merge; must exist.
        provenance: label, coefficients, coefficient_groups, losses and search are read.
    """
    if (provenance.losses is None and provenance.search is None) or provenance.coefficients is None:
        return
    label = str(provenance.label)
    _draw_coefficients(folder / COEFFICIENTS, label, provenance.coefficients, provenance.coefficient_groups or ())
    if provenance.losses:  # empty for coefficients learned through the clients
        _draw_losses(folder / LOSSES, label, provenance.losses, provenance.validation or ())


def _draw_coefficients(path: Path, label: str, coefficients: Mapping[str, Any], groups: Sequence[str]) -> None:
    from matplotlib.figure import Figure  # noqa: PLC0415 - slow to import, for learned merges only; draws with Agg

    rows = [value if isinstance(value, list) else [value] for value in coefficients.values()]
    largest = max(1e-6, *(abs(value) for row in rows for value in row))
    size = (min(MOST_INCHES, 2.5 + 0.6 * len(groups)), min(MOST_INCHES, 1.3 + 0.35 * len(rows)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(rows, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
    axes.set_xticks(range(len(groups)), groups, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), list(coefficients))
    if len(rows) * len(groups) <= 200:
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                dark = abs(value) > 0.6 * largest
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", size=8, color="white" if dark else "black")
    axes.set_title(label, size=10)
    figure.colorbar(image)
    figure.savefig(path, format="png", dpi=120)


def _draw_losses(
    path: Path, label: str, losses: Sequence[Mapping[str, float]], validation: Sequence[tuple[int, float]]
) -> None:
    from matplotlib.figure import Figure  # noqa: PLC0415 - as above

    names = list(losses[0]) if len(losses[0]) > 2 else ["total"]  # with one term, "total" is that term times its weight
    figure = Figure(figsize=(6.4, 1.0 + 1.7 * len(names)), layout="constrained")
    for name, axes in zip(names, figure.subplots(len(names), sharex=True, squeeze=False)[:, 0], strict=True):
        values = [step[name] for step in losses]
        axes.plot(range(1, len(values) + 1), values, color="0.75", linewidth=0.8)
        means = [sum(values[max(0, i - SMOOTHED + 1) : i + 1]) / min(i + 1, SMOOTHED) for i in range(len(values))]
        axes.plot(range(1, len(means) + 1), means, color="C0")
        if name == "total":
            axes.plot(
                [step for step, _ in validation], [score for _, score in validation], "o-", color="C1", markersize=3
            )
        axes.set_ylabel(name)
    axes.set_xlabel(f"step (line: mean of the last {SMOOTHED})")
    figure.suptitle(label, size=10)
    figure.savefig(path, format="png", dpi=120)
