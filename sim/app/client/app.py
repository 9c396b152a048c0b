"""The client app: one domain, opened from this machine's disk, answers the server's messages."""

from flwr.clientapp import ClientApp

from sim.app.client.coefficients import cohort, gradient
from sim.app.client.describing import catalog, describe
from sim.app.client.evaluation import evaluate_models
from sim.app.client.replies import replying
from sim.app.client.secure_sum import secagg_advertise, secagg_masked, secagg_share, secagg_unmask
from sim.app.client.training import train

app = ClientApp()

app.train()(replying(train))
app.evaluate()(replying(evaluate_models))
for handler in (
    describe,
    catalog,
    cohort,
    gradient,
    secagg_advertise,
    secagg_share,
    secagg_masked,
    secagg_unmask,
):
    app.query(handler.__name__)(replying(handler))  # the name of the function is that of the message
