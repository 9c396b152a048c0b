"""The client app: one domain, opened from this machine's disk, answers the server's messages."""

from collections.abc import Callable, Mapping

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from sim.app.client.coefficients import cohort, fit_personal, gradient, read_layer_map
from sim.app.client.describing import catalog, describe
from sim.app.client.evaluation import evaluate_models
from sim.app.client.experts import send_similarity
from sim.app.client.head_rounds import train_head_round
from sim.app.client.heads import train_heads
from sim.app.client.replies import log_to_stderr, replying
from sim.app.client.secure_sum import secagg_advertise, secagg_masked, secagg_share, secagg_unmask
from sim.app.client.training import train, weave
from sim.app.messages import records, secure_sum

QUERIES: Mapping[str, Callable[[Message, Context], RecordDict]] = {
    records.DESCRIBE: describe,
    records.CATALOG: catalog,
    records.COHORT: cohort,
    records.GRADIENT: gradient,
    records.LAYER_MAP: read_layer_map,
    records.SIMILARITY: send_similarity,
    secure_sum.ADVERTISE: secagg_advertise,
    secure_sum.SHARE: secagg_share,
    secure_sum.MASKED: secagg_masked,
    secure_sum.UNMASK: secagg_unmask,
}


def make_client_app(*, console: bool) -> ClientApp:
    """Register the handler of every message.

    Args:
        console: log to stderr, for a process with no other log; otherwise logging is left to the host.
    """
    app = ClientApp(mods=[_log_first] if console else [])
    app.train()(replying(train))
    app.train(records.TRAIN_HEAD.removeprefix("train."))(replying(train_heads))
    app.train(records.ROUND_HEAD.removeprefix("train."))(replying(train_head_round))
    app.train(records.WEAVE.removeprefix("train."))(replying(weave))
    app.train(records.FIT_PERSONAL.removeprefix("train."))(replying(fit_personal))
    app.evaluate()(replying(evaluate_models))
    for message_type, handler in QUERIES.items():
        app.query(message_type.removeprefix("query."))(replying(handler))
    return app


def _log_first(message: Message, context: Context, answer: Callable[[Message, Context], Message]) -> Message:
    log_to_stderr()
    return answer(message, context)


app = make_client_app(console=True)
