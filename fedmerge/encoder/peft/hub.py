"""Adapters of the Hugging Face hub as sources, downloaded or from the local cache."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from fedmerge.encoder.peft.contents import CONFIG_FILE
from fedmerge.errors import LayoutMismatchError

_SOURCE = re.compile(r"([\w.-]+/[\w.-]+)@([\w./-]+)")
_FILES = ("adapter_config.json", "adapter_model*.safetensors", "adapter_model.safetensors.index.json")


@dataclass(frozen=True)
class HubAdapter:
    """An adapter of the hub.

    Attributes:
        repository: ``organisation/name``.
        revision: branch, tag or commit.
    """

    repository: str
    revision: str

    @property
    def name(self) -> str:
        """Name without the organisation."""
        return self.repository.rpartition("/")[2]


def hub_adapter(source: str) -> HubAdapter | None:
    """Parse ``organisation/name@revision``; None for any other text. The revision is needed: a path has none."""
    found = _SOURCE.fullmatch(source)
    return HubAdapter(found[1], found[2]) if found else None


def fetch_adapter(adapter: HubAdapter) -> tuple[Path, str]:
    """Return the folder of an adapter in the cache of the hub, and its commit; download what is not there.

    Only the configuration and safetensors files are fetched. With ``HF_HUB_OFFLINE=1``, or without a network, the cache
    alone is read.

    Raises:
        LayoutMismatchError: the hub has no such adapter, or it is not reached and the cache does not hold it.
    """
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - only for sources of the hub
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils.tqdm import disable_progress_bars  # noqa: PLC0415

    source = f"{adapter.repository}@{adapter.revision}"
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        folder = Path(snapshot_download(adapter.repository, revision=adapter.revision, allow_patterns=list(_FILES)))
    except LocalEntryNotFoundError as error:
        raise LayoutMismatchError(
            f"adapter {source}: the hub cannot be reached, or HF_HUB_OFFLINE is set, and its cache does not hold this "
            "revision. Download it where there is a network, or give a folder."
        ) from error
    except GatedRepoError as error:
        raise LayoutMismatchError(
            f"adapter {source}: the hub gives it only to those whom its owner admits. Ask for access on its page, and "
            "log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise LayoutMismatchError(
            f"adapter {source}: the hub has no such revision. Check it, or give @main."
        ) from error
    except RepositoryNotFoundError as error:
        raise LayoutMismatchError(
            f"adapter {source}: the hub has no such repository, or a private one. Check the name; for a private one, "
            "log in with `hf auth login`."
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise LayoutMismatchError(
            f"adapter {source}: the hub refuses it ({reason}). Try again, or give a folder."
        ) from error
    if not (folder / CONFIG_FILE).is_file():
        raise LayoutMismatchError(
            f"adapter {source}: no {CONFIG_FILE} there, expected a PEFT adapter. Give the repository of an adapter."
        )
    return folder, folder.name
