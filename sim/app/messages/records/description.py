"""A client's description and its catalog."""

from dataclasses import asdict, dataclass
from typing import Literal

from flwr.app import ConfigRecord, RecordDict

from fedmerge.errors import ClientError
from sim.app.messages.records.fields import FACTS, ONE_VERSION, read_config, read_dataclass

DESCRIBE = "query.describe"
CATALOG = "query.catalog"
Role = Literal["train", "unseen", "idle"]


@dataclass(frozen=True)
class Description:
    """A client's description of itself.

    Attributes:
        domain: name; empty for a client without a domain.
        role: ``train``, ``unseen`` or ``idle``.
        num_users, num_items, num_interactions: counts of the domain.
        synthetic: True if the domain declares generated data.
        catalog_sha256: content hash of the catalog.
        backbone_sha256: hash over the encoder's weights and tokenizer.
        precision: ``float32`` or ``bfloat16``.
        fedmerge_version: of the client.
        policy: the privacy policy that the client enforces.
        num_nodes: number of nodes in all, in a simulation; otherwise 0.
        layout_sha256: hash of the LoRA layout that it trains.
        attributes: template of an item's text, joined with commas, see
            :func:`fedmerge.domain.manifest.read_template`.
    """

    domain: str
    role: Role
    num_users: int = 0
    num_items: int = 0
    num_interactions: int = 0
    synthetic: bool = False
    catalog_sha256: str = ""
    backbone_sha256: str = ""
    precision: str = ""
    fedmerge_version: str = ""
    policy: str = ""
    num_nodes: int = 0
    layout_sha256: str = ""
    attributes: str = ""


def description_record(description: Description) -> RecordDict:
    """Make the record of a client's description."""
    return RecordDict({FACTS: ConfigRecord(asdict(description))})


def read_description(content: RecordDict) -> Description:
    """Inverse of :func:`description_record`.

    Raises:
        ClientError: another form, for instance of another version.
    """
    return read_dataclass(Description, read_config(content, FACTS))


def catalog_record(data: bytes) -> RecordDict:
    """Make the record of a catalog, given as Parquet bytes."""
    return RecordDict({FACTS: ConfigRecord({"catalog": data})})


def read_catalog(content: RecordDict) -> bytes:
    """Inverse of :func:`catalog_record`."""
    data = read_config(content, FACTS).get("catalog")
    if not isinstance(data, bytes):
        raise ClientError(f"its catalog came as {type(data).__name__}, expected bytes; {ONE_VERSION}")
    return data
