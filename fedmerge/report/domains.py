"""A domain in words, for its owner."""

from pathlib import Path

from fedmerge.domain.folder import domain_info


def domain_text(folder: Path) -> str:
    """Counts, lengths, density, text coverage and problems of a domain folder.

    Raises:
        DomainError: the folder is damaged.
    """
    info = domain_info(folder)
    manifest = info.manifest
    coverage = ", ".join(f"{attribute} {100 * share:.1f} %" for attribute, share in info.attribute_shares.items())
    lines = [
        f"{manifest.name}{'  (SYNTHETIC)' if manifest.synthetic else ''}",
        f"  source          {manifest.source}",
        f"  catalog         {'public' if manifest.public_catalog else 'private: does not leave the client'}",
        f"  users           {manifest.num_users:,} ({info.num_short_users:,} have fewer than 3: never evaluated)",
        f"  items           {manifest.num_items:,} ({info.num_unused_items:,} without interactions)",
        f"  interactions    {manifest.num_interactions:,} ({info.num_repeats:,} repeats)",
        f"  a user's length {info.min_length} to {info.max_length}, median {info.median_length:g}",
        f"  density         {100 * info.density:.4f} %",
        f"  items with      {coverage}",
        f"  problems        {'; '.join(info.problems) if info.problems else 'none found'}",
    ]
    return "\n".join(lines)
