"""Public names that no page places by hand, so that the reference is complete at all times."""

import importlib
import inspect

__all__ = ["unplaced_names"]


def unplaced_names(package: str, page: str) -> str:
    """Directives for the public names of `package` that `page` does not mention as its own."""
    module = importlib.import_module(package)
    missing = [
        name
        for name in module.__all__
        if not name.startswith("_") and f":: {package}.{name}\n" not in page
    ]
    if not missing:
        return ""
    directives = [f".. {_directive(getattr(module, name))}:: {package}.{name}" for name in missing]
    return "\n".join(["## More", "", "```{eval-rst}", *directives, "```"])


def _directive(value: object) -> str:
    if inspect.isclass(value):
        return "autoexception" if issubclass(value, BaseException) else "autoclass"
    return "autofunction" if callable(value) else "autodata"
