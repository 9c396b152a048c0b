"""Upload an exported folder to the Hugging Face hub, private unless its owner says otherwise."""

from dataclasses import dataclass
from pathlib import Path

from fedmerge.errors import ConfigError

_MARK = "provenance.json"  # in every export


@dataclass(frozen=True)
class Push:
    """Where an export is uploaded.

    Attributes:
        repository: ``organisation/name`` of a model.
        public: everybody may read it.
    """

    repository: str
    public: bool


def check_sharing(push: Push, private: bool, license: str | None, kept_for: str | None) -> None:
    """Check, before anything is written, that an export may be uploaded.

    Args:
        push: where.
        private: True if the command says that the repository is to be private, and not by default.
        license: licence for the card.
        kept_for: why the export must stay within its organisation; None if it need not.

    Raises:
        ConfigError: a public repository for what must stay, or without a licence; a private one for what must stay, if
            that was not said.
    """
    if kept_for is not None and not private:
        remedy = "Give --private if it is the organisation's own repository, and see who can read that."
        raise ConfigError(
            f"--push {push.repository}: {kept_for}, so it must stay within the organisation. "
            + ("It cannot be public." if push.public else remedy)
        )
    if push.public and license is None:
        raise ConfigError(
            f"--push {push.repository}: found --public without a licence, so that nobody may use the model. Give "
            "--license, such as apache-2.0, that the backbone's licence allows."
        )


def check_repository(push: Push) -> None:
    """Check that there is a login, and that the repository is new or an earlier export with this visibility.

    Raises:
        ConfigError: otherwise, or if the hub cannot be asked.
    """
    from huggingface_hub import HfApi, get_token  # noqa: PLC0415  # only where something is uploaded

    if get_token() is None:
        raise ConfigError(
            f"--push {push.repository}: not logged in to the hub. Run: hf auth login, with a token that may write."
        )
    try:
        HfApi().whoami()
    except Exception as error:
        raise _failure(push, "the hub does not know you", error) from error
    _check_found(push)


def _check_found(push: Push) -> None:
    from huggingface_hub import HfApi  # noqa: PLC0415  # as above
    from huggingface_hub.errors import RepositoryNotFoundError  # noqa: PLC0415  # as above

    try:
        found = HfApi().model_info(push.repository)
    except RepositoryNotFoundError:
        return
    except Exception as error:
        raise _failure(push, "the hub does not answer as expected", error) from error
    if bool(found.private) == push.public:
        state, remedy = ("private", "without --public") if found.private else ("public", "with --public")
        raise ConfigError(
            f"--push {push.repository}: the repository exists and is {state}. Push {remedy}, change it on the hub, or "
            "give another name."
        )
    names = {file.rfilename for file in found.siblings or ()} - {".gitattributes"}
    if names and _MARK not in names:
        raise ConfigError(
            f"--push {push.repository}: the repository holds something other than an export of fedmerge. Give another "
            "name."
        )


def upload(folder: Path, push: Push, message: str) -> str:
    """Create the repository if need be, and make an exported folder its content; files of earlier exports go.

    Args:
        folder: of the export.
        push: where.
        message: of the commit.

    Returns:
        The address of the repository.

    Raises:
        ConfigError: the hub refuses something, or is not reached.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415  # only where something is uploaded

    api = HfApi()
    try:
        address = api.create_repo(push.repository, private=not push.public, exist_ok=True)
        _check_found(push)  # an organisation may have its own idea of what is private
        api.upload_folder(repo_id=push.repository, folder_path=folder, commit_message=message, delete_patterns=["*"])
    except ConfigError:
        raise
    except Exception as error:
        why = f"{folder} is complete, but was not uploaded"
        raise _failure(push, why, error, f" Try: hf upload {push.repository} {folder}") from error
    return str(address)


def _failure(push: Push, what: str, error: Exception, remedy: str = "") -> ConfigError:
    """Say it in one line; the hub's client raises many kinds: no network, no access, a bad name, a bad card."""
    reason = next((line for line in str(error).splitlines() if line.strip()), "")
    return ConfigError(
        f"--push {push.repository}: {what} ({type(error).__name__}: {reason}). Check the name, the network and that "
        f"your token may write there.{remedy}"
    )
