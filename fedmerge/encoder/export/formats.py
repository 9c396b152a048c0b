"""The formats of an export: their files, and the packages that write them. Needs no torch."""

import importlib.util
from collections.abc import Mapping
from typing import Literal, get_args

from fedmerge.errors import ConfigError

Format = Literal["sentence-transformers", "onnx", "openvino"]
FORMATS: tuple[Format, ...] = get_args(Format)

_GRAPH_WRITERS = ("onnx", "onnxscript")
_PACKAGES: Mapping[Format, tuple[str, ...]] = {
    "sentence-transformers": (),  # whoever loads the folder needs it
    "onnx": (*_GRAPH_WRITERS, "onnxruntime"),
    "openvino": (*_GRAPH_WRITERS, "openvino", "nncf"),
}
# In float32 and int8: where optimum, sentence-transformers and transformers.js look for them.
GRAPH_FILES: Mapping[Format, str] = {"onnx": "onnx/model.onnx", "openvino": "openvino/openvino_model.xml"}


def check_format(to: Format, int8: bool) -> None:
    """Check, before anything is computed, that a format can be written here.

    Raises:
        ConfigError: a package is not installed, or the format has no int8.
    """
    if int8 and to not in GRAPH_FILES:
        others = " or ".join(GRAPH_FILES)
        raise ConfigError(f"export: found int8 with {to}, expected it with {others}. Give one of them.")
    if missing := [name for name in packages(to, int8) if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"export to {to}: {', '.join(missing)} not installed. Install with pip install 'fedmerge[{to}]', or export "
            "to sentence-transformers."
        )


def packages(to: Format, int8: bool) -> tuple[str, ...]:
    """Return the packages that write a format, beside PyTorch."""
    return tuple(name for name in _PACKAGES[to] if int8 or name != "nncf")
