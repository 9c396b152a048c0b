"""A small domain to train on."""

import pytest

from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.config import Text
from fedmerge.domain.demo import generate_domain
from fedmerge.domain.folder import write_domain
from fedmerge.encoder.backbone import Backbone


@pytest.fixture(scope="module")
def toys(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> LocalDomain:
    demo = generate_domain("toys", num_users=30, num_items=25)
    folder = tmp_path_factory.mktemp("domains") / "toys"
    write_domain(folder, demo.catalog, demo.interactions, public_catalog=True, synthetic=True, source="test")
    return open_domain(folder, backbone, Text(max_attribute_tokens=6, max_items=3, max_tokens=48))
