"""Record the linear layers of a running torch model as a layer dump.

The model and what it is run on come as a `CaptureSource`, made from a Python function
(`load_entry`) or from a local diffusers folder (`capture_diffusers`), or by hand. Its ``calls`` is
an iterable of ``(time_step, inputs)``, one item a model call. ``time_step`` is a number; ``inputs``
is a dict of keyword arguments, a tuple of positional ones, or one tensor. If ``calls`` is a
generator, the model's output is what its ``yield`` returns, so a denoising loop is

    def calls():
        x = noise
        for t in steps:
            velocity = yield t, {"hidden_states": x, "timestep": t}
            x = x - velocity / len(steps)

(A generator that hands on a list does so with ``for``; ``yield from`` a list takes nothing back.)

An entry point (`load_entry`) is a Python function that the user names,
``package.module:function`` or ``path/to/file.py:function``. It takes no argument and returns

- ``(model, calls)``, a torch module and calls as above;
- ``(model, draw)`` as ``loraq-sim images`` takes it: a generator function that makes such calls,
  called with ``steps``, ``images``, ``guidance``, ``seed`` and ``first`` (`drawing_calls`);
- ``(model, run)``, where ``run()`` makes the calls itself: each call of the module is then one
  model call, and its time step is what it gets as ``timestep`` (``t``, ``timesteps``, ``sigma``);
- a pipeline instead of the model, whose denoiser (`DENOISERS`) is recorded: ``(pipe, run)``,
  ``(pipe, prompts)``, or ``pipe`` alone, which is called with each prompt that the command has.

It is the user's own code and runs as such; nothing is ever loaded from a dump. Compiled models run
as they were before ``torch.compile``, where hooks see their layers; weights of quantized layers are
the floats they stand for.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from os.path import commonprefix
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from loraq_sim.dumps.capture_families import call_pipeline, drawing_calls, is_draw
from loraq_sim.dumps.capture_hooks import GemmWeight, InputRecorder, running_eagerly, step_of
from loraq_sim.dumps.capture_weights import (
    FunctionWeights,
    left_out_of_capture,
    weights_of_modules,
)
from loraq_sim.dumps.checkpoint_folder import DENOISERS
from loraq_sim.dumps.kinds import kinds_of
from loraq_sim.dumps.layer_dump import LayerDump
from loraq_sim.dumps.stored import StoredDump, StoredLayer, StoredTensor, first_line, step_record
from loraq_sim.errors import DumpError, InputError, LoraqError, counted, unknown_name
from loraq_sim.layers import STORAGE_DTYPES, as_array
from loraq_sim.version import __version__

if TYPE_CHECKING:
    import torch

__all__ = [
    "CaptureSource",
    "MAX_TOKENS",
    "called_entry",
    "capture_layers",
    "load_entry",
]


MAX_TOKENS = 65_536


@dataclass(frozen=True, kw_only=True)
class CaptureSource:
    """A model, the calls to run it on, and where they come from.

    `name` names the source in messages and in the dump; `calls` is described in this module;
    `meta` holds further plain facts for the dump; `n_calls` is how many calls there will be, if
    known. With `run`, which makes the calls itself, `calls` is empty.
    """

    name: str
    model: "torch.nn.Module"
    calls: Iterable[tuple[float, Any]] = ()
    run: Callable[[], object] | None = None
    meta: Mapping[str, object] = field(default_factory=dict)
    n_calls: int | None = None


def capture_layers(
    source: CaptureSource,
    *,
    tokens: int = 256,
    patterns: Iterable[str] = (),
    seed: int = 0,
    on_call: Callable[[], None] | None = None,
) -> LayerDump:
    """Run the model and return its layers with sampled input rows.

    The dump has no file and holds the model's own weights; write it with `write_layer_dump`. Inputs
    that several layers read are sampled and stored once. ``dump.skipped`` lists layers that did not
    run; ``dump.meta`` records model, sampling and the time step of every row (`capture_steps`).

    Parameters
    ----------
    source : CaptureSource
        Its model is set to evaluation mode and run without gradients.
    tokens : int
        Rows kept of each distinct input, a uniform sample over all calls.
    patterns : iterable of str
        Shell patterns over layer names and kinds; none means all layers.
    seed : int
        Of the sampling. A row's chance to be kept depends on seed and layer name alone.
    on_call : callable, optional
        Called after each model call.

    Raises
    ------
    InputError
        If `tokens` is out of range.
    DumpError
        If the model has no matching linear layer, a call is malformed or fails, inputs hold NaN or
        Inf, or no layer ran.
    """
    if not 1 <= tokens <= MAX_TOKENS:
        raise InputError(f"tokens must be 1 to {MAX_TOKENS}, got {tokens}")
    patterns = list(patterns)
    modules, functions = _choose(source, patterns)
    recorder = InputRecorder(modules, tokens, seed)
    with recorder.hooked(), running_eagerly(), functions.watched(recorder.see):
        made = _run if source.run is None else _run_by_itself
        steps, n_calls = made(source, recorder, on_call)
    ran = {name: layer for name, layer in recorder.layers.items() if layer.sample is not None}
    if not ran:
        raise DumpError(
            f"{source.name}: none of {counted(len(recorder.layers), 'linear layer')} ran in "
            f"{counted(n_calls, 'call')}; "
            "check the model and its inputs"
        )
    groups = _name_groups({name: id(layer.sample) for name, layer in ran.items()})
    samples = {id(layer.sample): layer.sample for layer in ran.values()}
    rows = {key: sample.in_order() for key, sample in samples.items() if sample is not None}
    kinds = kinds_of([*weights_of_modules(source.model), *ran])
    steps_of_rows = {groups[name]: rows[id(layer.sample)][1] for name, layer in ran.items()}
    meta = {
        "model": type(source.model).__name__,
        "origin": f"captured by loraq-sim {__version__} from {source.name}",
        "seed": seed,
        "model_calls": n_calls,
        "sampling": f"uniform over all calls, at most {tokens} rows of each input",
        **source.meta,
        "torch": _torch_version(),
        "time_steps": step_record(steps, steps_of_rows),
    }
    layers = {}
    for name, layer in ran.items():
        bias = recorder.weights[name].bias
        layers[name] = StoredLayer(
            name=name,
            kind=kinds[name],
            group=groups[name],
            rows_per_call=layer.rows_per_call,
            calls_per_step=layer.most_in_call,
            activations=_sampled(groups[name], layer.dtype, rows[id(layer.sample)][0]),
            weight=_parameter(name, "weight", recorder.weights[name].weight()),
            bias=None if bias is None else _parameter(name, "bias", bias),
        )
    skipped = {name: "did not run" for name in modules if name not in ran}
    ran_weights = {name: recorder.weights[name] for name in (*ran, *modules)}
    stored = StoredDump(
        layers=layers,
        meta=meta,
        skipped=skipped,
        left_out="" if patterns else left_out_of_capture(source.model, ran_weights),
    )
    return LayerDump(Path(source.name), stored)


def _choose(
    source: CaptureSource, patterns: list[str]
) -> tuple[dict[str, GemmWeight], FunctionWeights]:
    modules = weights_of_modules(source.model)
    functions = FunctionWeights(source.model, modules)
    names = [*modules, *functions.names]
    if not names:
        raise DumpError(f"{source.name}: the model has no Linear layer and no convolution")
    if not patterns:
        return modules, functions
    kinds = kinds_of(names)
    records = {name: StoredLayer(name=name, kind=kinds[name]) for name in names}
    wanted = LayerDump(Path(source.name), StoredDump(layers=records, meta={})).select(patterns)
    functions.names = [name for name in functions.names if name in wanted]
    return {name: modules[name] for name in modules if name in wanted}, functions


def _run(
    source: CaptureSource, recorder: InputRecorder, on_call: Callable[[], None] | None
) -> tuple[list[float], int]:
    """Run all calls; return the time steps in order of appearance, and the number of calls."""
    import torch

    steps: dict[float, int] = {}
    n_calls = 0
    source.model.eval()
    answer = None
    send = getattr(source.calls, "send", None)
    items = iter(source.calls)
    with torch.no_grad():
        while True:
            try:
                item = send(answer) if send else next(items)
            except StopIteration:
                break
            except Exception as error:
                raise _failed(source, f"its inputs for call {n_calls + 1}", error) from error
            step, args, kwargs = _parse_call(source, n_calls + 1, item)
            recorder.begin_call(steps.setdefault(step, len(steps)))
            try:
                answer = source.model(*args, **kwargs)
            except LoraqError as error:
                raise DumpError(f"{source.name}: {error}") from error
            except Exception as error:
                raise _failed(source, f"model call {n_calls + 1}", error) from error
            n_calls += 1
            if on_call is not None:
                on_call()
    return list(steps), n_calls


def _run_by_itself(
    source: CaptureSource, recorder: InputRecorder, on_call: Callable[[], None] | None
) -> tuple[list[float], int]:
    """As `_run`, where the source's own code calls the model."""
    import torch

    steps: dict[float, int] = {}
    n_calls = 0

    def begin(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal n_calls
        step = step_of(args, kwargs, n_calls)
        recorder.begin_call(steps.setdefault(step, len(steps)))
        n_calls += 1

    def end(*_: object) -> None:
        if on_call is not None:
            on_call()

    source.model.eval()
    handles = [
        source.model.register_forward_pre_hook(begin, with_kwargs=True),
        source.model.register_forward_hook(end),
    ]
    try:
        with torch.no_grad():
            if source.run is not None:
                source.run()
    except LoraqError as error:
        raise DumpError(f"{source.name}: {error}") from error
    except Exception as error:
        raise _failed(source, f"its run, after {counted(n_calls, 'model call')},", error) from error
    finally:
        for handle in handles:
            handle.remove()
    if n_calls == 0:
        raise DumpError(
            f"{source.name}: its run never called the {type(source.model).__name__}; return the "
            "module that denoises"
        )
    return list(steps), n_calls


def _failed(source: CaptureSource, what: str, error: Exception) -> DumpError:
    return DumpError(f"{source.name}: {what} failed: {type(error).__name__}: {first_line(error)}")


def _parse_call(
    source: CaptureSource, number: int, item: object
) -> tuple[float, tuple[Any, ...], dict[str, Any]]:
    import torch

    step, inputs = item if isinstance(item, tuple) and len(item) == 2 else (None, None)
    if isinstance(step, torch.Tensor) and step.numel() == 1:
        step = step.item()
    if isinstance(step, Real) and np.isfinite(float(step)):
        step = step if isinstance(step, int) else float(step)
        if isinstance(inputs, torch.Tensor):
            return step, (inputs,), {}
        if isinstance(inputs, tuple | list):
            return step, tuple(inputs), {}
        if isinstance(inputs, Mapping):
            return step, (), dict(inputs)
    raise DumpError(
        f"{source.name}: call {number} must be (time step, inputs) with a finite number and a "
        f"dict, tuple or tensor, got {_describe(item)}"
    )


def _describe(item: object) -> str:
    if isinstance(item, tuple):
        return f"a tuple of {', '.join(type(part).__name__ for part in item[:4]) or 'nothing'}"
    return f"a {type(item).__name__}"


def _name_groups(samples: Mapping[str, int]) -> dict[str, str]:
    """Name the layers' groups, one a sample: the path that its layers have in common."""
    members: dict[int, list[str]] = {}
    for name, sample in samples.items():
        members.setdefault(sample, []).append(name)
    taken: set[str] = set()
    groups: dict[str, str] = {}
    for names in members.values():
        group = names[0]
        if len(names) > 1:
            shared = ".".join(commonprefix([name.split(".") for name in names]))
            group = shared if shared and shared not in taken else f"{names[0]} and others"
        taken.add(group)
        groups |= dict.fromkeys(names, group)
    return groups


def _sampled(group: str, dtype: str, rows: NDArray[np.float32]) -> StoredTensor:
    # What a Layer cannot hold (float64, 8-bit floats) is kept as the float32 it was sampled in.
    dtype = dtype if dtype in STORAGE_DTYPES[:3] else "float32"
    return StoredTensor(
        key=f"{group}.activations",
        shape=rows.shape,
        dtype=dtype,
        nbytes=rows.size * (4 if dtype == "float32" else 2),
        load=lambda: rows,
    )


def _parameter(name: str, tensor: str, values: "torch.Tensor") -> StoredTensor:
    dtype = str(values.dtype).removeprefix("torch.")
    if dtype not in STORAGE_DTYPES:
        # A quantized tensor, which has become the floats it stands for when it is loaded.
        dtype = "float32"
    return StoredTensor(
        key=f"{name}.{tensor}",
        shape=tuple(values.shape),
        dtype=dtype,
        nbytes=values.numel() * values.element_size(),
        load=partial(as_array, values),
    )


def _torch_version() -> str:
    import torch

    # A subclass of str, which the reader of pickles refuses.
    return str(torch.__version__)


def load_entry(
    entry: str,
    *,
    seed: int = 0,
    prompts: Iterable[str] = (),
    steps: int | None = None,
    images: int = 2,
    guidance: float = 4.5,
) -> CaptureSource:
    """Import and call an entry point.

    Parameters
    ----------
    entry : str
        ``module:function`` or ``file.py:function``; modules are also sought in the current folder.
    seed : int
        torch is seeded with it before the function is called.
    prompts : iterable of str
        What a pipeline is called with, where the function returns one alone.
    steps : int, optional
        Denoising steps of such a pipeline, its own default without; of a ``draw``, 20 without.
    images, guidance
        What a ``draw`` is called with.

    Raises
    ------
    DumpError
        If the entry point cannot be found, fails, or returns something else.
    """
    made = called_entry(entry, seed)
    model, calls = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    denoiser = _denoiser_of(model)
    prompts = list(prompts)
    if denoiser is not None and denoiser is not model and not callable(calls):
        prompts = [calls] if isinstance(calls, str) else list(calls or prompts)
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise DumpError(
                f"{entry}: returns a pipeline and nothing to call it with; give --prompts FILE, or "
                "return (pipe, run) or (pipe, [prompt, ...])"
            )
        calls = partial(call_pipeline, model, prompts, steps, seed)
    if denoiser is None or not (callable(calls) or isinstance(calls, Iterable)):
        raise DumpError(
            f"{entry}: the function must return (model, calls), a torch module and an iterable of "
            "(time step, inputs), or (model, run), or (model, draw) as for images, or a pipeline "
            f"with a {' or '.join(DENOISERS[:2])}"
        )
    denoiser = getattr(denoiser, "_orig_mod", denoiser)
    if callable(calls) and not isinstance(calls, Iterable):
        if not is_draw(calls):
            return CaptureSource(name=entry, model=denoiser, run=calls)
        steps = 20 if steps is None else steps
        made = drawing_calls(calls, entry, steps=steps, images=images, guidance=guidance, seed=seed)
        meta = {"images": images, "guidance": guidance}
        return CaptureSource(name=entry, model=denoiser, calls=made, meta=meta, n_calls=steps)
    n_calls = len(calls) if isinstance(calls, Sized) else None
    return CaptureSource(name=entry, model=denoiser, calls=calls, n_calls=n_calls)


def called_entry(entry: str, seed: int) -> Any:
    """What the function of an entry point returns, torch seeded before; errors as `load_entry`."""
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
        return function()
    except LoraqError:
        raise
    except Exception as error:
        raise DumpError(
            f"{entry}: the function failed: {type(error).__name__}: {first_line(error)}"
        ) from error


def _denoiser_of(made: object) -> "torch.nn.Module | None":
    """The module itself, or that of a pipeline which denoises."""
    import torch

    if isinstance(made, torch.nn.Module):
        return made
    parts = [getattr(made, name, None) for name in DENOISERS]
    return next((part for part in parts if isinstance(part, torch.nn.Module)), None)


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
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
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
