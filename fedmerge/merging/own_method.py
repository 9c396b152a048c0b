"""A merging method of one's own: a plain function, passed as it is or named ``package.module:function``.

    def halves(updates: torch.Tensor, coefficient: float = 1.0) -> torch.Tensor:
        return coefficient * updates.mean(0)

It is called for one linear module at a time, with the K updates Δ_k = c_k · scaling_k · B_k A_k, float32 (K, out, in).
c_k are the coefficients given to ``merge_adapters``; domains are sorted by name, and those at 0 are absent. The
function returns the merge, (out, in). In core space out and in are those of the core. It may change the updates in
place.

Every other argument needs a default, which becomes the default of a parameter: ``fm.merge(…, name=value)`` and the
flags of ``fedmerge merge`` set it, and an experiment varies ``density`` by ``merge.densities`` and ``coefficient`` by
``merge.coefficients``. An argument called ``seed`` is set for each module; a method that draws uses it.

The function runs where merges are made: in the process of ``fedmerge merge``, of the server, or of a notebook. A client
never imports it.
"""

import importlib
import inspect
import traceback
from collections.abc import Callable, Mapping

import torch

from fedmerge.errors import ConfigError, FedMergeError, MergeError
from fedmerge.merging.parameters import Parameter, Value

OwnMethod = Callable[..., torch.Tensor]
SEED = "seed"  # the argument that gets a seed for each module


def load_function(name: str) -> OwnMethod:
    """Import the function that ``package.module:function`` names.

    Raises:
        ConfigError: the module cannot be imported, or holds no such function.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module does at import
        raise ConfigError(
            f"merging method {name!r}: importing {module_name!r} raised {type(error).__name__}: {error}. Install the "
            "package, or put the folder of the module on PYTHONPATH."
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        found = "nothing of that name" if function is None else f"a {type(function).__name__}"
        raise ConfigError(
            f"merging method {name!r}: found {found} in {module.__file__ or module_name}, expected a function. "
            "Correct the name after the colon."
        )
    return function  # type: ignore[no-any-return]  # what it returns is checked at every call


def function_name(function: OwnMethod) -> str:
    """Return ``package.module:function``, the name in settings."""
    return f"{function.__module__}:{getattr(function, '__qualname__', type(function).__qualname__)}"


def function_parameters(name: str, function: OwnMethod) -> tuple[dict[str, Parameter], bool]:
    """Read the parameters of a method from its function's arguments; also return True if it takes a seed.

    Raises:
        ConfigError: no argument for the updates, or another argument without a default that settings can express.
    """
    arguments = list(inspect.signature(function).parameters.values())
    named = [each for each in arguments if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    if not named or named[0].kind == inspect.Parameter.KEYWORD_ONLY:
        raise ConfigError(
            f"merging method {name!r}: found arguments {inspect.signature(function)}, expected the updates as the "
            "first one."
        )
    parameters = {}
    for argument in named[1:]:
        default = argument.default
        if argument.name == SEED:
            continue
        if argument.kind == argument.POSITIONAL_ONLY or not isinstance(default, Value):
            found = "no default" if default is argument.empty else f"default {default!r}"
            raise ConfigError(
                f"merging method {name!r}: argument {argument.name!r} has {found}, expected a number, text, True, "
                "False or None, passed by name. Give it one."
            )
        parameters[argument.name] = Parameter(default, number=not isinstance(default, (bool, str)))
    return parameters, any(argument.name == SEED for argument in named[1:])


def call_function(
    name: str, function: OwnMethod, module: str, updates: torch.Tensor, parameters: Mapping[str, Value]
) -> torch.Tensor:
    """Merge one module with a function and check the result.

    Args:
        name: of the method, for errors.
        module: name of the module, for errors.
        updates: (K, out, in) float32.
        parameters: arguments of the function, the seed included.

    Returns:
        (out, in), in the dtype that the function chose.

    Raises:
        MergeError: the function raised, or did not return a finite (out, in) tensor.
    """
    where, shape = f"merging method {name!r}, module {module}", tuple(updates.shape[1:])
    try:
        with torch.no_grad():
            merged = function(updates, **parameters)
    except FedMergeError:
        raise
    except Exception as error:  # whatever the function does
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise MergeError(
            f"{where}: the function raised {type(error).__name__}: {error} ({last.filename}, line {last.lineno})"
        ) from error
    if not isinstance(merged, torch.Tensor) or tuple(merged.shape) != shape or not merged.is_floating_point():
        found = (
            f"{merged.dtype} of shape {tuple(merged.shape)}"
            if isinstance(merged, torch.Tensor)
            else type(merged).__name__
        )
        raise MergeError(f"{where}: the function returned {found}, expected a floating-point tensor of shape {shape}")
    if bad := int((~merged.isfinite()).sum()):
        raise MergeError(
            f"{where}: the function returned {bad} of {merged.numel()} values NaN or infinite, expected finite ones"
        )
    return merged
