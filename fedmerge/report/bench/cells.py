"""The section with the settings and environment of every cell."""

from collections.abc import Mapping
from typing import Any

from fedmerge.report.bench.notation import counted
from fedmerge.report.bench_tables import FINISHED, BenchTables
from fedmerge.report.html.page import Html, folded, is_number, join, seconds, settings


def cells_section(tables: BenchTables) -> Html:
    """Return status, settings and environment of every cell."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for cell in tables.cells:
        groups.setdefault(f"{cell['dataset']} · {cell['strategy']}", []).append(cell)
    if len(tables.cells) == 1:
        return _cell_parts(tables.cells[0])
    parts = []
    for name, cells in groups.items():
        finished = sum(cell["status"] == FINISHED for cell in cells)
        folds = [(cell, f", without {cell['left_out']}" if cell["left_out"] else "") for cell in cells]
        parts.append(
            folded(
                f"{name} – {finished} of {counted(len(cells), 'cell')} finished",
                *(
                    folded(f"seed {cell['seed']}{fold} – {cell['status']}{_time(cell)}", _cell_parts(cell))
                    for cell, fold in folds
                ),
            )
        )
    return join(*parts)


def _time(cell: Mapping[str, Any]) -> str:
    return f", {seconds(cell['seconds'])}" if is_number(cell["seconds"]) else ""


def _cell_parts(cell: Mapping[str, Any]) -> Html:
    facts_of_cell = {key: value for key, value in cell.items() if key not in {"config", "environment"}}
    return join(
        settings(facts_of_cell),
        folded("Settings", settings(cell["config"])),
        folded("Environment", settings(cell["environment"])),
    )
