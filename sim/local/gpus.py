"""GPUs of a simulated client."""

import ctypes

from fedmerge.config import Runtime


def gpus_of_client(runtime: Runtime) -> float:
    """Resolve ``runtime.gpus_per_client``: ``auto`` is a whole GPU where PyTorch sees one and may use it, else none."""
    if runtime.gpus_per_client != "auto":
        return runtime.gpus_per_client
    if runtime.device == "cpu" or not _has_driver():
        return 0.0
    import torch  # noqa: PLC0415 - takes seconds, which machines without a driver are spared

    return float(torch.cuda.is_available())


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
