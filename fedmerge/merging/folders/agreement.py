"""Settings that PEFT folders which are to be merged must agree on."""

import json
from collections.abc import Mapping
from typing import Any

from fedmerge.encoder.peft.contents import Contents
from fedmerge.encoder.peft.names import EVERY_LINEAR
from fedmerge.errors import LayoutMismatchError

Configs = Mapping[str, Mapping[str, Any]]
_NEWEST = (None, "", "main")  # the revision that is loaded if none is given


def agreed_base(configs: Configs, given: str | None, same_weights: bool) -> tuple[str | None, str | None]:
    """Return name and revision of the base model.

    Args:
        configs: name -> content of ``adapter_config.json``.
        given: ``NAME`` or ``NAME@REVISION`` that a person chose; None takes what the folders say.
        same_weights: True if hashes show that all folders have the same backbone, under whatever names.

    Raises:
        LayoutMismatchError: the folders name different base models, or different revisions of one.
    """
    named, at, chosen = (given or "").rpartition("@")
    if given is not None and at and "/" not in chosen:
        return named, chosen
    remedy = "Merge adapters of one base model. If these names mean the same one, choose a name with --base-model."
    name = given or agreed_setting("base_model_name_or_path", configs, remedy, first=same_weights)
    revisions = {
        each: None if config.get("revision") in _NEWEST else str(config["revision"])
        for each, config in configs.items()
        if config.get("base_model_name_or_path")
    }
    if len(set(revisions.values())) > 1 and not same_weights:
        found = ", ".join(f"{each} {revision or 'main'!r}" for each, revision in revisions.items())
        raise LayoutMismatchError(
            f"the adapters differ in the revision of their base model ({found}), so that their weights may differ. "
            "Merge adapters of one revision. If these revisions mean the same weights, choose one with "
            "--base-model NAME@REVISION."
        )
    return name, next(iter(revisions.values()), None)


def agreed_setting(key: str, configs: Configs, remedy: str, first: bool = False) -> str | None:
    """Return the value of a setting, which must be the same in all folders that have it, unless ``first``."""
    given = {name: str(config[key]) for name, config in configs.items() if config.get(key)}
    if len(set(given.values())) > 1 and not first:
        found = ", ".join(f"{name} {value!r}" for name, value in given.items())
        raise LayoutMismatchError(f"the adapters differ in {key} ({found}). {remedy}")
    return next(iter(given.values()), None)


def agreed_mapping(configs: Configs, remedy: str) -> Mapping[str, Any] | None:
    """Return ``auto_mapping``, with which PEFT finds the class of a base model that has no task type."""
    texts = {
        name: {"auto_mapping": json.dumps(config["auto_mapping"], sort_keys=True)}
        for name, config in configs.items()
        if config.get("auto_mapping")
    }
    found = agreed_setting("auto_mapping", texts, remedy)
    mapping = None if found is None else json.loads(found)
    return mapping if isinstance(mapping, dict) else None


def agreed_targets(contents: Mapping[str, Contents]) -> tuple[str, ...] | str | None:
    """Return ``target_modules`` that match the modules of the folders and no others; None if they must be listed.

    Lists of names match together what each of them matches alone, unless a folder narrows its list, leaves a part out,
    or lacks a module that it names. A regular expression is kept if all folders have the same.
    """
    narrowed = ("layers_to_transform", "layers_pattern", "exclude_modules", "modules_to_save")
    configs = [each.config for each in contents.values()]
    exact = not any(each.left_out or each.ignored or each.lacking for each in contents.values())
    if not exact or any(config.get(key) not in (None, []) for config in configs for key in narrowed):
        return None
    targets = [config.get("target_modules") for config in configs]
    lists = [names for names in targets if isinstance(names, list) and names and EVERY_LINEAR not in names]
    if len(lists) == len(targets):
        return tuple(sorted({str(name) for names in lists for name in names}))
    first = targets[0]
    return first if isinstance(first, str) and first != EVERY_LINEAR and targets.count(first) == len(targets) else None
