"""The non-public parts of Flower that the travelling app uses; ``sim.flower_internals`` has the others.

A file of its own, since only ``sim/app`` is in the bundle. tests/machines/test_flower_internals.py names what an
upgrade of Flower breaks.
"""

from flwr.common.constant import ErrorCode
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.supercore.run import RunNotRunningException
from flwr.superlink.grid import InMemoryGrid

__all__ = [
    "ErrorCode",
    "InMemoryGrid",
    "PullAppMessagesRequest",
    "PullAppMessagesResponse",
    "RunNotRunningException",
]
