"""Cut a domain to a share of its users: a smaller shop with the same catalog."""

from pathlib import Path

import numpy as np

from fedmerge.domain.catalog import load_catalog
from fedmerge.domain.folder import write_domain
from fedmerge.domain.interactions import load_interactions, make_interactions
from fedmerge.domain.manifest import Manifest, read_manifest
from fedmerge.errors import DomainError
from fedmerge.seeding import generator

MIN_USERS = 2  # as training needs


def cut_domain(source: Path, destination: Path, share: float, seed: int, overwrite: bool = False) -> Manifest:
    """Write a domain with a random share of a domain's users, each with all interactions, and the whole catalog.

    With one seed, the users of a smaller share are among those of a larger one.

    Args:
        source: domain folder, which is only read.
        destination: folder for the new domain folder, which gets the same name.
        share: share of the users to keep, in (0, 1]; their number is rounded.
        seed: seed of the draw.
        overwrite: replace an existing domain.

    Returns:
        The manifest of the new domain.

    Raises:
        DomainError: a share out of range or too small for two users, a damaged source, or a destination that may not be
            replaced.
    """
    if not 0 < share <= 1:
        raise DomainError(f"cut: the share of users is {share:g}, expected a number above 0 and at most 1.")
    manifest, interactions = read_manifest(source), load_interactions(source)
    num_users = round(share * interactions.num_users)
    if num_users < MIN_USERS:
        raise DomainError(
            f"{source}: {share:g} of {interactions.num_users} users are {num_users}, expected at least {MIN_USERS}, as "
            "training needs. Choose a larger share."
        )
    if (destination / manifest.name).resolve() == source.resolve():
        raise DomainError(f"{source}: the cut domain would replace its source. Choose another destination.")
    drawn = generator(seed, "cut", manifest.name).permutation(interactions.num_users)[:num_users]
    users = np.sort(drawn).tolist()
    return write_domain(
        destination / manifest.name,
        load_catalog(source),
        make_interactions(
            [interactions.user_ids[user] for user in users], [interactions.sequence(user) for user in users]
        ),
        public_catalog=manifest.public_catalog,
        synthetic=manifest.synthetic,
        source=f"{manifest.source}; {num_users} of {interactions.num_users} users, drawn with seed {seed}",
        catalog_source=manifest.catalog_source,
        overwrite=overwrite,
    )
