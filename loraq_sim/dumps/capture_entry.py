"""Take a model and its inputs from a Python function that the user names.

``package.module:function`` or ``path/to/file.py:function``. The function takes no argument and
returns ``(model, calls)``: a torch module, and an iterable or generator as `capture` describes. It
is the user's own code and runs as such; nothing is ever loaded from a dump.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from loraq_sim.dumps.capture import CaptureSource
from loraq_sim.dumps.stored import first_line
from loraq_sim.errors import DumpError, LoraqError, unknown_name

__all__ = ["load_entry"]


def load_entry(entry: str, *, seed: int = 0) -> CaptureSource:
    """Import and call an entry point.

    Parameters
    ----------
    entry : str
        ``module:function`` or ``file.py:function``; modules are also sought in the current folder.
    seed : int
        torch is seeded with it before the function is called.

    Raises
    ------
    DumpError
        If the entry point cannot be found, fails, or returns something else.
    """
    import torch

    place, colon, name = entry.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise DumpError(
            f"{entry}: expected module:function, file.py:function or a folder of a diffusers model"
        )
    module = _import(entry, place)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise DumpError(f"{entry}: {unknown_name('function', name, known)}")
    torch.manual_seed(seed)
    try:
        made = function()
    except LoraqError:
        raise
    except Exception as error:
        raise DumpError(
            f"{entry}: the function failed: {type(error).__name__}: {first_line(error)}"
        ) from error
    is_pair = isinstance(made, tuple) and len(made) == 2
    if not (is_pair and isinstance(made[0], torch.nn.Module) and isinstance(made[1], Iterable)):
        raise DumpError(
            f"{entry}: the function must return (model, calls), a torch module and an iterable of "
            "(time step, inputs)"
        )
    model, calls = made
    n_calls = len(calls) if hasattr(calls, "__len__") else None
    return CaptureSource(name=entry, model=model, calls=calls, n_calls=n_calls)


def _import(entry: str, place: str) -> ModuleType:
    try:
        return _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    except FileNotFoundError:
        raise DumpError(f"{entry}: no file {place}; check the path") from None
    # A module may raise anything while it is imported, and exit besides.
    except (Exception, SystemExit) as error:
        raise DumpError(
            f"{entry}: {place} cannot be imported: {type(error).__name__}: {first_line(error)}"
        ) from error


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> ModuleType:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    finally:
        if here in sys.path:
            sys.path.remove(here)
