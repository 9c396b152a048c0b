"""LIVAR-style weights: each client's say in a module follows how strongly its training moved A and B there."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from fedmerge.adapter import Adapter
from fedmerge.files import read_record
from fedmerge.merging.stack import StackLayout

REPORT_FILE = "training.json"  # beside an adapter, of an expert's training

QUANTILES_A, QUANTILES_B = (0.25, 0.5), (0.6, 0.8)
WEIGHTS = (  # rows: I_B below, between and above its quantiles; columns: I_A
    (0.03813978, 0.03813978, 0.03813978),
    (0.09813978, 0.08813978, 0.07813978),
    (0.19313978, 0.11813978, 0.09313978),
)
"""Published raw weights. The authors fitted them to vision benchmarks."""


@dataclass(frozen=True)
class TrainingSignals:
    """The training signals of one expert.

    Attributes:
        of_modules: module -> (I_A, I_B), sums over all steps; a module that is not named has (0, 0).
        steps: number of these steps.
        entries: module -> numbers of entries of lora_A and of lora_B.
        spread: spread of the client's users; None if it is not known.
    """

    of_modules: Mapping[str, tuple[float, float]]
    steps: int
    entries: Mapping[str, tuple[int, int]]
    spread: float | None = None


Signals = Mapping[str, TrainingSignals | None]
"""Domain -> its signals; None, or no entry, if its expert has none."""
NO_SIGNALS: Signals = MappingProxyType({})


def read_signals(folder: Path, adapter: Adapter) -> TrainingSignals | None:
    """Read the signals beside an adapter, from ``training.json``; None if it holds none.

    Experts of an older version, of other tools, and of trainings with noise have none.

    Args:
        folder: of the adapter: of a client's cache, or ``adapters/<domain>`` of a run.
        adapter: the adapter in it.

    Raises:
        RunDirError: the file is damaged.
    """
    return signals_of(read_record(folder / REPORT_FILE), adapter)


def signals_of(report: Mapping[str, Any], adapter: Adapter) -> TrainingSignals | None:
    """Return the signals in the report of a training, ``signals``, ``steps`` and ``spread``; None without them."""
    found, steps, spread = report.get("signals"), report.get("steps"), report.get("spread")
    if not isinstance(found, Mapping) or type(steps) is not int:
        return None
    modules = adapter.modules.items()
    entries = {name: (module.lora_A.numel(), module.lora_B.numel()) for name, module in modules}
    of_modules = {name: (float(pair[0]), float(pair[1])) for name, pair in found.items()}
    return TrainingSignals(of_modules, steps, entries, None if spread is None else float(spread))


def livar(
    layout: StackLayout,
    coefficient: float,
    per_step: bool,
    per_entry: bool,
    spread: bool,
    signals: Signals = NO_SIGNALS,
) -> torch.Tensor:
    """Return λ w_{k,m}: weights that sum to 1 over the domains, from a table of nine cells, times λ.

    I_A and I_B of a module are compared with their quantiles over all domains and modules. A domain without signals, or
    whose signals are all 0, weighs 1/K everywhere, and the others share the rest. Signals that all are equal give the
    average.

    Args:
        layout: layout of the K adapters.
        coefficient: λ.
        per_step: divide signals by the number of steps, so that a long training gets no weight by its length.
        per_entry: divide signals by √(number of entries), so that modules of all sizes have like signals.
        spread: multiply the raw weights of a domain by the spread of its users; a domain without it has no signals.
        signals: domain -> its signals.

    Returns:
        (K, G) float32; for a group of several modules the mean of their weights.

    Source: LIVAR, arXiv:2507.06813, and ``livar`` in aimagelab/fed-mammoth, for the table and its quantiles.
    Differs: the release averages A and B separately, sums signals over rounds without dividing them, and serves the
        plain weighted mean of the products; here the products are weighed, and the weighted sum is served. Its
        signals are those of ``per_step`` and ``per_entry`` False. The spread of users stands for its variance of
        features, since a text encoder has no classes.
    """
    domains, modules = layout.domains, list(layout.group_of)
    known = [k for k, domain in enumerate(domains) if _is_known(signals.get(domain), spread)]
    weights = np.full((len(domains), len(modules)), 1 / len(domains))
    if known:
        found = [signals[domains[k]] for k in known]
        both = np.array([_scaled(each, modules, per_step, per_entry) for each in found if each is not None])
        raw = np.array(WEIGHTS)[_cells(both[..., 1], QUANTILES_B), _cells(both[..., 0], QUANTILES_A)]
        if spread:
            raw = raw * np.array([[each.spread] for each in found if each is not None])
        total = raw.sum(0)
        shares = np.divide(raw, total, out=np.full_like(raw, 1 / len(known)), where=total > 0)
        weights[known] = shares * len(known) / len(domains)
    groups = np.array(list(layout.group_of.values()))
    columns = [weights[:, groups == group].mean(axis=1) for group in range(len(layout.groups))]
    return torch.from_numpy(coefficient * np.stack(columns, axis=1)).float()


def without_signals(domains: tuple[str, ...], signals: Signals, spread: bool = False) -> list[str]:
    """Return the domains that weigh 1/K for lack of signals, in order."""
    return [domain for domain in domains if not _is_known(signals.get(domain), spread)]


def _is_known(found: TrainingSignals | None, spread: bool) -> bool:
    if found is None or found.steps < 1 or (spread and found.spread is None):
        return False
    return any(value > 0 for pair in found.of_modules.values() for value in pair)


def _scaled(found: TrainingSignals, modules: list[str], per_step: bool, per_entry: bool) -> np.ndarray:
    """The signals of one domain: (modules, 2) float64."""
    values = np.array([found.of_modules.get(name, (0.0, 0.0)) for name in modules])
    if per_step:
        values /= found.steps
    if per_entry:
        values /= np.sqrt([found.entries.get(name, (1, 1)) for name in modules])
    return values


def _cells(values: np.ndarray, quantiles: tuple[float, float]) -> np.ndarray:
    """0 where a value is below the first quantile of all values, 2 where above the second, else 1."""
    low, high = np.quantile(values, quantiles)
    return np.where(values < low, 0, np.where(values > high, 2, 1))
