"""A domain, or its import, as text for the domain's owner."""

from pathlib import Path

from fedmerge.domain.folder import domain_info
from fedmerge.domain.importers.bad_rows import reason_text
from fedmerge.domain.importers.events import MAX_LOSS, ImportReport
from fedmerge.domain.importers.store import REPEATED
from fedmerge.escaping import one_line


def domain_text(folder: Path) -> str:
    """Return the counts, lengths, density, text coverage and problems of a domain folder.

    Raises:
        DomainError: the folder is damaged.
    """
    info = domain_info(folder)
    manifest = info.manifest
    coverage = ", ".join(f"{attribute} {100 * share:.1f} %" for attribute, share in info.attribute_shares.items())
    lines = [
        f"{manifest.name}{'  (SYNTHETIC)' if manifest.synthetic else ''}",
        f"  source          {manifest.source}",
        f"  catalog         {'public' if manifest.public_catalog else 'private: does not leave the client'}; its items "
        f"{'are given' if manifest.catalog_source == 'given' else 'depend on interactions'}",
        f"  users           {manifest.num_users:,} ({info.num_short_users:,} fewer than 3 items: never evaluated)",
        f"  items           {manifest.num_items:,} ({info.num_unused_items:,} without interactions)",
        f"  interactions    {manifest.num_interactions:,} ({info.num_repeats:,} repeats)",
        f"  a user's length {info.min_length} to {info.max_length}, median {info.median_length:g}",
        f"  density         {100 * info.density:.4f} %",
        f"  items with      {coverage}",
        f"  problems        {'; '.join(info.problems) if info.problems else 'none found'}",
    ]
    return "\n".join(one_line(line) for line in lines)


def import_warnings(report: ImportReport) -> list[str]:
    """Return a line for each kind of loss of more than a tenth of the rows of interactions."""
    num_rows, source = report.files[0].num_rows, report.files[0].source
    lost, repeats = sum(report.lost.values()), report.dropped.get(REPEATED, 0)
    lines = []
    if lost > MAX_LOSS * num_rows:
        lines.append(f"{100 * lost / num_rows:.0f} % of the rows of {source} are lost: {', '.join(report.lost)}")
    if repeats > MAX_LOSS * num_rows:
        lines.append(
            f"{100 * repeats / num_rows:.0f} % of the rows of {source} repeat an earlier user, item and time; if the "
            "times are dates only, these may be interactions of their own"
        )
    return [one_line(line) for line in lines]


def import_text(report: ImportReport) -> str:
    """Return the counts of an import, the rows it left out with their reasons, and the bad rows of each file."""
    manifest = report.manifest
    lines = [f"{manifest.num_users} users, {manifest.num_items} items, {manifest.num_interactions} interactions"]
    if report.dropped:
        left_out = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items())
        lines.append(f"  left out of {report.files[0].num_rows} rows: {left_out}")
    for file in report.files:
        if file.bad:
            lines.append(f"  {file.source}: {file.num_bad} bad of {file.num_rows} rows:")
            lines += [f"    {reason_text(reason, file.unit)}" for reason in file.bad]
        lines += [f"  {file.source}: {note}" for note in file.notes]
    return "\n".join(one_line(line) for line in lines)
