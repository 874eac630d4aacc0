"""Watch the inputs of a model's linear layers while it runs, and keep a sample of their rows.

Layers that read the same tensor (q, k and v) share one `RowSample`, uniform and of a fixed size.
Whether they do is seen in the first model call, and checked in every later one: a layer that goes
its own way from some call on continues with a sample of its own.
"""

import hashlib
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from loraq_sim.errors import DumpError

if TYPE_CHECKING:
    import torch

    LinearModule = torch.nn.Linear | torch.nn.Conv1d | torch.nn.Conv2d

__all__ = [
    "GemmWeight",
    "InputRecorder",
    "RowSample",
    "find_linear_layers",
    "running_eagerly",
    "step_of",
    "weight_of",
]


class RowSample:
    """At most `budget` rows of a stream, every row with the same chance.

    Each row of the stream gets a random key from [0, 1); the rows with the smallest keys are kept
    (bottom-k sampling), so rows may arrive in batches of any size, and only those kept are copied.

    Parameters
    ----------
    budget : int
        Most rows kept.
    seed : int
    name : str
        Seed and name fix the keys, whatever other streams are sampled.
    """

    def __init__(self, budget: int, seed: int, name: str) -> None:
        self._budget = budget
        self._rng = _generator(seed, name)
        self._bound = 1.0
        self._keys = np.empty(0)
        # Firing, time step and place in the stream of each kept row.
        self._origin = np.empty((0, 3), dtype=np.int64)
        # Without columns until the width is known.
        self._rows: NDArray[np.float32] = np.empty((0, 0), dtype=np.float32)
        self._n_seen = 0

    def choose(self, count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Places among the next `count` rows that are worth reading, and their keys."""
        keys = self._rng.random(count)
        places = np.flatnonzero(keys < self._bound)
        if len(places) > self._budget:
            order = np.argpartition(keys[places], self._budget)
            self._bound = float(keys[places[order[self._budget]]])
            places = np.sort(places[order[: self._budget]])
        return places, keys[places]

    def add(
        self,
        rows: NDArray[np.float32],
        places: NDArray[np.int64],
        keys: NDArray[np.float64],
        *,
        count: int,
        firing: int,
        step: int,
    ) -> None:
        """Offer the rows that `choose` named out of `count`.

        Parameters
        ----------
        rows : ndarray of shape (len(places), K), float32
        places, keys : ndarray of shape (len(places),)
            From `choose`.
        count : int
            Rows of the batch, chosen or not.
        firing : int
            How often the layer had run before.
        step : int
            Index of the time step.
        """
        origin = np.empty((len(places), 3), dtype=np.int64)
        origin[:, 0], origin[:, 1], origin[:, 2] = firing, step, self._n_seen + places
        self._n_seen += count
        self._keys = np.concatenate([self._keys, keys])
        self._origin = np.concatenate([self._origin, origin])
        self._rows = np.concatenate([self._rows, rows]) if self._rows.size else rows
        if len(self._keys) > self._budget:
            kept = np.argpartition(self._keys, self._budget)
            self._bound = float(self._keys[kept[self._budget]])
            self._keep(np.sort(kept[: self._budget]))

    def before(self, firing: int, seed: int, name: str) -> "RowSample":
        """A copy without the rows of this firing and later ones, to be continued on its own.

        The bound stays, so the copy remains a uniform sample of all it has seen and will see.
        """
        copy = RowSample(self._budget, seed, name)
        copy._bound, copy._keys, copy._origin = self._bound, self._keys, self._origin
        copy._rows, copy._n_seen = self._rows, self._n_seen
        copy._keep(np.flatnonzero(self._origin[:, 0] < firing))
        return copy

    def in_order(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The kept rows of shape (T, K) in order of time step, then of arrival; and their steps."""
        order = np.lexsort((self._origin[:, 2], self._origin[:, 1]))
        return self._rows[order], self._origin[order, 1]

    def __len__(self) -> int:
        return len(self._keys)

    def _keep(self, places: NDArray[np.int64]) -> None:
        self._keys, self._origin = self._keys[places], self._origin[places]
        self._rows = self._rows[places]


def _generator(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()))


def find_linear_layers(model: "torch.nn.Module") -> dict[str, "LinearModule"]:
    """Every Linear and every 1x1 convolution of a model, by name, in the order of definition.

    So are quantized Linears that hold a float, torchao or torch.ao weight. Names are those without
    ``torch.compile``.
    """
    import torch

    found: dict[str, LinearModule] = {}
    for name, module in model.named_modules():
        if (
            isinstance(module, torch.nn.Linear)
            or isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d)
            and _is_1x1(module)
            or _is_quantized_linear(module)
        ):
            bare = ".".join(part for part in name.split(".") if part != "_orig_mod")
            found[bare or "model"] = module
    return found


def weight_of(module: Any) -> "torch.Tensor":
    """Weight of a layer, (N, K): a parameter, or what a method of torch.ao's layers returns."""
    weight: Any = module.weight
    return weight() if callable(weight) else weight


def _is_quantized_linear(module: Any) -> bool:
    """Whether it is a Linear of ``torch.ao.nn.quantized``, whose weight is a method."""
    return (
        type(module).__module__.startswith("torch.ao.nn.quantized")
        and hasattr(module, "in_features")
        and callable(getattr(module, "weight", None))
        and not hasattr(weight_of(module), "kernel_size")
    )


@dataclass(frozen=True, kw_only=True)
class GemmWeight:
    """One weight of a model that is a matrix product.

    Attributes
    ----------
    module : torch module, or None
        Whose input is read; None where a function multiplies.
    weight : callable
        Gives (N, K).
    bias : tensor of shape (N,), or None
    rows : callable, optional
        Gives the number of rows and K that the product makes of an input, and what cuts rows out
        by their numbers. Default: an input is (..., K). Equal ones make equal rows.
    """

    module: Any
    weight: "Callable[[], torch.Tensor]"
    bias: "torch.Tensor | None"
    rows: Callable[[Any], tuple[int, int, Callable[[Any], Any]]] | None = None

    def rows_of(self, x: "torch.Tensor") -> tuple[int, int, Callable[[Any], Any]]:
        """As `rows` says."""
        if self.rows is not None:
            return self.rows(x)
        flat = x.detach().reshape(-1, x.shape[-1])
        return len(flat), flat.shape[1], flat.__getitem__


@dataclass
class _Watched:
    """What is known about one layer: its sample, how often it ran, and in how large calls."""

    sample: RowSample | None = None
    shares_with: str = ""
    n_firings: int = 0
    n_in_call: int = 0
    most_in_call: int = 0
    rows_per_call: int = 0
    dtype: str = ""


@dataclass(frozen=True)
class _Sighting:
    """A tensor that a layer has read in the current call; `tensor` is a weak reference."""

    tensor: "weakref.ref[torch.Tensor]"
    layer: str
    firing: int


class InputRecorder:
    """Samples the input rows of layers.

    Parameters
    ----------
    weights : mapping of name to GemmWeight
    budget : int
        Rows kept of each distinct input.
    seed : int

    Attributes
    ----------
    layers : dict of name to record
        Each with `sample` (None if the layer never ran), `rows_per_call`, `most_in_call` (runs in
        one model call) and `dtype` of its inputs. Shared samples are one object.
    weights : dict of name to GemmWeight
        Those given, and those that `see` told of.
    """

    def __init__(self, weights: Mapping[str, GemmWeight], budget: int, seed: int) -> None:
        self.layers = {name: _Watched() for name in weights}
        self.weights = dict(weights)
        self._budget = budget
        self._seed = seed
        self._step = 0
        self._sightings: dict[tuple, _Sighting] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Watch the layers inside the block."""
        handles = []
        try:
            for name, weight in self.weights.items():
                hook = partial(self._hook, name)
                handles.append(weight.module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
        for name, layer in self.layers.items():
            if layer.shares_with and layer.n_firings != self.layers[layer.shares_with].n_firings:
                self._part(name, layer)

    def begin_call(self, step: int) -> None:
        """Say that the next model call belongs to this time step (an index)."""
        self._step = step
        self._sightings.clear()
        for layer in self.layers.values():
            layer.n_in_call = 0

    def _hook(self, name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._fire(name, args[0] if args else next(iter(kwargs.values())))

    def see(self, name: str, weight: GemmWeight, x: "torch.Tensor") -> None:
        """Take the input of a product that no hook sees."""
        if name not in self.layers:
            self.layers[name], self.weights[name] = _Watched(), weight
        # An expert that no token was sent to.
        if x.numel():
            self._fire(name, x)

    def _fire(self, name: str, x: "torch.Tensor") -> None:
        layer = self.layers[name]
        firing = layer.n_firings
        seen = self._see(name, x, firing)
        layer.n_firings += 1
        layer.n_in_call += 1
        layer.most_in_call = max(layer.most_in_call, layer.n_in_call)
        if firing == 0:
            layer.dtype = str(x.dtype).removeprefix("torch.")
            if seen.layer != name and seen.firing == 0:
                layer.shares_with = seen.layer
                layer.sample = self.layers[seen.layer].sample
        if layer.shares_with:
            if seen.layer == layer.shares_with and seen.firing == firing:
                layer.rows_per_call = self.layers[seen.layer].rows_per_call
                return
            self._part(name, layer, firing)
        if layer.sample is None:
            layer.sample = RowSample(self._budget, self._seed, name)
        self._record(name, layer, layer.sample, x, firing)

    def _see(self, name: str, x: "torch.Tensor", firing: int) -> _Sighting:
        """Whoever read this very tensor first in the current call; perhaps this layer itself."""
        # The version tells a tensor that was changed in place from what it was before.
        # Inference tensors count no versions: then nothing is taken for shared.
        version = object() if x.is_inference() else x._version
        cut = self.weights[name].rows
        key = (x.data_ptr(), tuple(x.shape), x.stride(), x.dtype, x.device, version, cut)
        seen = self._sightings.get(key)
        # A dead reference: another tensor now lies where the first one was.
        if seen is None or seen.tensor() is None:
            seen = self._sightings[key] = _Sighting(weakref.ref(x), name, firing)
        return seen

    def _part(self, name: str, layer: _Watched, firing: int | None = None) -> None:
        """Give a layer a sample of its own, with what it shared until then."""
        until = layer.n_firings if firing is None else firing
        if layer.sample is not None:
            layer.sample = layer.sample.before(until, self._seed, name)
        layer.shares_with = ""

    def _record(
        self, name: str, layer: _Watched, sample: RowSample, x: "torch.Tensor", firing: int
    ) -> None:
        import torch

        count, width, cut = self.weights[name].rows_of(x)
        weight = self.weights[name].weight()
        if width != weight.shape[1]:
            hint = ""
            if not weight.dtype.is_floating_point:
                hint = "; its codes are packed: capture the model before it is quantized"
            raise DumpError(
                f"layer {name!r}: reads {width} features, but its weight has "
                f"{weight.shape[1]}{hint}"
            )
        layer.rows_per_call = max(layer.rows_per_call, count)
        places, keys = sample.choose(count)
        # Late calls of a long run may add nothing: their inputs are not touched.
        values = np.empty((0, width), np.float32)
        if len(places):
            chosen = cut(torch.from_numpy(places).to(x.device))
            values = chosen.to("cpu", torch.float32).numpy()
        if not np.isfinite(values).all():
            raise DumpError(
                f"layer {name!r}: its inputs hold NaN or Inf at time step number {self._step + 1}; "
                "run the model in a wider dtype, or on inputs it was made for"
            )
        sample.add(values, places, keys, count=count, firing=firing, step=self._step)


def _is_1x1(module: "torch.nn.Conv1d | torch.nn.Conv2d") -> bool:
    return (
        set(module.kernel_size) == set(module.stride) == {1}
        and module.groups == 1
        and module.padding in (0, "valid", (0,), (0, 0))
    )


_STEP_NAMES = ("timestep", "timesteps", "t", "sigma", "time")


def step_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], number: int) -> float:
    """Time step of a call by the name of its argument, else the one number among the others.

    Samples of one call have one time step. A call that tells none has its own number.
    """
    named = [kwargs[name] for name in _STEP_NAMES if name in kwargs]
    for value in (*named, *args[1:]):
        size = getattr(value, "numel", lambda: 1)()
        if size < 1 or size > 1 and value.ndim > 1:
            continue
        try:
            first = value.flatten()[0] if hasattr(value, "flatten") else value
            step = float(first)
        except (TypeError, ValueError, RuntimeError):
            continue
        if np.isfinite(step):
            return step
    return float(number)


@contextmanager
def running_eagerly() -> Iterator[None]:
    """Run compiled parts as they were written: compiled code does not tell hooks of its layers."""
    import torch

    stance = getattr(torch.compiler, "set_stance", None)
    # Nothing is compiled where the compiler, which takes seconds to import, never was.
    if stance is None or "torch._dynamo" not in sys.modules:
        yield
        return
    with stance("force_eager"):
        yield
