"""The methods in words and tables: for the command line and the documentation."""

from typing import get_args

from fedmerge.merging.methods import METHODS, Law, Method, method_named
from fedmerge.merging.parameters import markdown_table, parameter_text


def describe_method(name: str) -> str:
    """Describe a method in several lines of text.

    Raises:
        ConfigError: no such method.
    """
    method = method_named(name)
    about = [("use", method.use)]
    about += [("parameter", f"{key} = {parameter_text(parameter)}") for key, parameter in method.parameters.items()]
    about += [
        ("scope", _scopes(method)),
        ("cost", method.cost),
        ("source", method.source),
        ("laws", ", ".join(method.laws) or "none declared"),
    ]
    return f"{name}: {method.what}\n" + "".join(f"  {key:<11}{text}\n" for key, text in about)


def methods_table() -> str:
    """Return METHODS as a Markdown table, without the laws."""
    rows = []
    for name, method in METHODS.items():
        parameters = ", ".join(f"{key} {parameter_text(parameter)}" for key, parameter in method.parameters.items())
        rows.append(
            (f"`{name}`", method.what, method.use, parameters or "none", _scopes(method), method.cost, method.source)
        )
    return markdown_table(("method", "what it is", "when to use", "parameters", "scope", "cost", "source"), rows)


def laws_table() -> str:
    """Return the laws of every method as a Markdown table."""
    laws = get_args(Law)
    rows = [(f"`{name}`", *("x" if law in method.laws else "" for law in laws)) for name, method in METHODS.items()]
    return markdown_table(("method", *laws), rows)


def _scopes(method: Method) -> str:
    if method.learned:
        return "its granularity" if "granularity" in method.parameters else "layer"
    return "tensor, layer, model" if method.rows else "all the same" if method.coefficients else "tensor"
