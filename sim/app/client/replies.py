"""Replies to the server: size limit, signature, errors without private data, and the client's log."""

import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path

from flwr.app import Context, Message, RecordDict

from fedmerge.errors import ClientError, FedMergeError
from fedmerge.escaping import RecordFormatter
from fedmerge.privacy.client_policy import check_message_size
from fedmerge.privacy.paths import without_paths
from fedmerge.privacy.signatures import read_private_key, sign, statement
from sim.app.client.node import Client, domain_name, own_paths, own_policy
from sim.app.messages import records

logger = logging.getLogger("fedmerge.client")


def replying(handler: Callable[[Message, Context], RecordDict]) -> Callable[[Message, Context], Message]:
    """Send what a handler returns as a signed reply, and an error as a reply that names it."""

    @wraps(handler)
    def answer(message: Message, context: Context) -> Message:
        try:
            content = handler(message, context)
            if own := own_policy(context):
                check_message_size(own, records.size_bytes(content), domain_name(context))
            if key_path := context.node_config.get("key-path"):
                asked = message.metadata
                stated = statement(asked.run_id, asked.message_id, records.content_sha256(content))
                records.add_signature(content, sign(read_private_key(Path(str(key_path))), stated))
        except FedMergeError as error:
            logger.error("%s: %s", type(error).__name__, error)
            text = without_paths(f"{type(error).__name__}: {error}", own_paths(context))
            content = records.error_record(text, domain_name(context))
        except Exception as error:  # its text may quote private data, so it stays in this client's own log
            logger.error("%s", traceback.format_exc())
            text = f"{type(error).__name__}; details are in the client's own log"
            content = records.error_record(text, domain_name(context))
        return Message(content, reply_to=message)

    return answer


@contextmanager
def neutral_errors(client: Client, what: str, always: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Without exact metrics, log an error and raise a neutral one: a number of users in its text is an exact sum.

    Args:
        client: this node.
        what: what failed, for the server.
        always: errors whose text stays here with exact metrics as well.

    Raises:
        ClientError: what failed, and where the reason is.
    """
    try:
        yield
    except Exception as error:
        if client.config.privacy.metrics == "exact" and not isinstance(error, always):
            raise
        name = client.domain.manifest.name
        logger.exception("%s: %s", name, what)
        raise ClientError(f"domain {name}: {what}; the reason is in the client's log") from error


@cache
def log_to_stderr() -> None:
    """Log the library to stderr, set up once a process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(RecordFormatter("%(asctime)s client %(message)s", "%H:%M:%S"))
    library = logging.getLogger("fedmerge")
    library.addHandler(handler)
    library.setLevel(logging.INFO)
    library.propagate = False
