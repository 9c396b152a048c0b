"""One thread for every test: equalities hold at a fixed thread count, and tiny models are slower on two."""

import torch

torch.set_num_threads(1)
