"""One thread for every test: equalities hold at a fixed thread count, and tiny models are slower on two."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("fedmerge", deadline=None)  # a busy machine is no failure
settings.load_profile("fedmerge")
