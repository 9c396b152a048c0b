"""Device and precision, resolved once at entry."""

from dataclasses import dataclass

import torch

from fedmerge.errors import ConfigError

AMPERE = (8, 0)  # compute capability of the first GPUs that multiply bfloat16


@dataclass(frozen=True)
class Compute:
    """Device and precision of an encoder.

    Attributes:
        device: the torch device.
        autocast_dtype: dtype of matrix products under autocast; None for float32 throughout.
        reason: reason for this choice, for the log.
    """

    device: torch.device
    autocast_dtype: torch.dtype | None
    reason: str

    @property
    def precision(self) -> str:
        """``"bfloat16"`` or ``"float32"``."""
        return "float32" if self.autocast_dtype is None else "bfloat16"


def resolve_compute(device: str = "auto", precision: str = "auto") -> Compute:
    """Resolve ``auto`` to the fastest device and precision of this machine.

    Args:
        device: ``auto`` (CUDA if available, else CPU), ``cpu``, ``cuda`` or ``cuda:N``.
        precision: ``auto`` (bfloat16 if the processor multiplies it natively), ``bfloat16`` or ``float32``.

    Raises:
        ConfigError: the device does not exist on this machine.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"runtime.device = {device!r}, but PyTorch {torch.__version__} finds no GPU here. "
            "Set runtime.device = 'cpu' or 'auto', or install a CUDA build of PyTorch."
        )
    found = torch.cuda.device_count()
    if device.startswith("cuda:") and int(device.removeprefix("cuda:")) >= found:
        raise ConfigError(
            f"runtime.device = {device!r}, but PyTorch numbers the GPUs here from 0 to {found - 1}. Set 'cuda', or one "
            "of these numbers."
        )
    resolved = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))
    if precision != "auto":
        return Compute(resolved, torch.bfloat16 if precision == "bfloat16" else None, f"{resolved}, {precision} as set")
    if resolved.type == "cuda":
        native = torch.cuda.get_device_capability(resolved) >= AMPERE
    else:
        native = _cpu_multiplies_bfloat16()
    if native:
        return Compute(resolved, torch.bfloat16, f"{resolved}, bfloat16: native here")
    return Compute(resolved, None, f"{resolved}, float32: bfloat16 is not native here")


def _cpu_multiplies_bfloat16() -> bool:
    read = getattr(torch.cpu, "get_capabilities", None)  # missing in older PyTorch, which then uses float32
    capabilities: dict[str, object] = read() if read else {}
    return any(bool(capabilities.get(name)) for name in ("amx_bf16", "avx512_bf16", "bf16"))
