"""What all tests share, one thread: equalities hold at a fixed thread count; tiny models are slower on two."""

import logging

import pytest
import torch
from backbones import tiny_bert
from hypothesis import settings

from fedmerge.device import resolve_compute
from fedmerge.encoder.backbone import Backbone, load_backbone

settings.register_profile("fedmerge", deadline=None)  # a busy machine is no failure
settings.load_profile("fedmerge")


def pytest_runtest_setup() -> None:
    """What commands, servers and clients set for a whole process ends with the test that ran them there.

    Threads: one, also after one that took as many as its configuration says. Logging: their handlers write to a stream
    that pytest closes after the test.
    """
    torch.set_num_threads(1)
    library = logging.getLogger("fedmerge")
    library.handlers.clear()
    library.propagate = True
    library.setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A tiny BERT in float32."""
    return load_backbone(str(tiny_bert(tmp_path_factory.mktemp("bert"))), "mean", resolve_compute("cpu", "float32"))
