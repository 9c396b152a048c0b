"""Names of modules as PEFT matches them: ``target_modules``, ``rank_pattern``, ``alpha_pattern``, ``modules_to_save``.

A plain name in these settings also matches every module whose name ends with it: ``proj`` hits ``encoder.proj``, too.
What is written here is therefore anchored and escaped, and hits one module.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

EVERY_LINEAR = "all-linear"  # PEFT's name for all linear layers but the output layer


def anchored(name: str) -> str:
    """Return a key of ``rank_pattern`` or ``alpha_pattern`` that matches this module only."""
    return f"^{re.escape(name)}"


def exact_targets(names: Iterable[str]) -> str:
    """Return ``target_modules`` that match these modules only, as the regular expression ``^(…|…)$``."""
    return f"^({'|'.join(re.escape(name) for name in sorted(names))})$"


def value_of(pattern: Mapping[str, float] | None, name: str, default: float) -> float:
    """Return the rank or alpha of a module: that of the first key that matches the end of its name, as in PEFT."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def is_target(name: str, config: Mapping[str, Any]) -> bool:
    """Return True if PEFT gives this module a LoRA when it loads the folder.

    Args:
        name: name of the module in the bare backbone.
        config: content of ``adapter_config.json``. Settings that only the model resolves (``all-linear``, or no
            ``target_modules``) match every module.

    Source: ``check_target_module_exists`` in ``peft/tuners/tuners_utils.py``.
    """
    excluded, targets = config.get("exclude_modules"), config.get("target_modules")
    if (excluded and _matches(name, excluded)) or is_saved_whole(name, config.get("modules_to_save")):
        return False
    if not targets or targets in (EVERY_LINEAR, [EVERY_LINEAR]):
        return True
    layers = config.get("layers_to_transform")
    if isinstance(targets, str) or name in targets or layers is None or layers == []:
        return _matches(name, targets)
    found = _layer_index(name, config.get("layers_pattern") or [])
    return _matches(name, targets) and found in ([layers] if isinstance(layers, int) else layers)


def unmatched_targets(config: Mapping[str, Any], names: Iterable[str]) -> tuple[str, ...]:
    """Return the names in a list of ``target_modules`` that match none of these modules, sorted.

    Names that the configuration excludes or saves whole are left out, and so are patterns, of which only the model
    knows what they match.
    """
    targets = config.get("target_modules")
    if not isinstance(targets, list) or EVERY_LINEAR in targets:
        return ()
    held, alone = list(names), {**config, "layers_to_transform": None}
    return tuple(
        sorted(
            target
            for target in targets
            if is_target(target, alone) and not any(_matches(name, [target]) for name in held)
        )
    )


def is_saved_whole(name: str, modules_to_save: Iterable[str] | None) -> bool:
    """Return True for a module that ``modules_to_save`` names, and for every module inside one."""
    return any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in modules_to_save or ())


def _matches(name: str, patterns: str | Iterable[str]) -> bool:
    """Match a regular expression, or a list of names or their last parts."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _layer_index(name: str, patterns: str | Iterable[str]) -> int | None:
    """Return the first number in a name, after one of the patterns if there are any."""
    given = [patterns] if isinstance(patterns, str) else list(patterns)
    expressions = [rf"(?:^|.*?\.){each}\.(\d+)\." for each in given] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for each in expressions if (match := re.match(each, name))), None)
    return int(found[1]) if found else None
