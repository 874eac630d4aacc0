"""Which matrix products a running torch model makes of its weights, and which rows each reads.

**Modules** (`weights_of_modules`), whose inputs a hook sees:

- Linear layers, quantized ones too, and transformers' ``Conv1D``, which keeps its weight (K, N);
- layers within an adapter of PEFT: one layer, whose weight has the active adapters merged;
- convolutions as im2col: a row (C * kernel) of the padded input for each output position, with the
  module's stride, padding and dilation. Rows are cut out one by one (`Patches`), so nothing of the
  size of all patches is ever made. Convolutions in groups, depthwise ones among them, and
  transposed ones are no single product and are left out.

**Functions** (`FunctionWeights`), where a model multiplies with a parameter itself: ``F.linear``,
which ``torch.nn.MultiheadAttention`` calls, ``matmul`` and ``@``, ``mm``, ``addmm``, ``bmm`` and
grouped products of experts. The weight of a call is found by where it lies in memory, so a slice of
a parameter is known: an expert of (E, N, K) or (E, K, N), or rows of a fused projection. Names are
those that a checkpoint of the same model gives: ``attn.in_proj``, ``mlp.experts.gate_up_proj.3``.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from loraq_sim.dumps.capture_hooks import GemmWeight, find_linear_layers, weight_of
from loraq_sim.errors import DumpError, counted

if TYPE_CHECKING:
    import torch

__all__ = ["FunctionWeights", "left_out_of_capture", "weights_of_modules"]


@dataclass(frozen=True, kw_only=True)
class Patches:
    """What a convolution reads: `kernel`, `stride`, `dilation` an axis, `pads` before and after.

    `mode` is torch's name of the values in the padding.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    mode: str

    def __call__(
        self, x: "torch.Tensor"
    ) -> "tuple[int, int, Callable[[torch.Tensor], torch.Tensor]]":
        """Rows and width K of the im2col of `x`, and what cuts out rows by their numbers.

        `x` is (batch, channels, *sizes), or without the batch. Rows go over batch, then positions;
        columns over channels, then the kernel, as a weight (N, C, *kernel) is flattened.
        """
        import torch

        axes = len(self.kernel)
        x = x if x.ndim > axes + 1 else x[None]
        channels, width = x.shape[1], x.shape[1] * math.prod(self.kernel)
        sides = zip(x.shape[2:], self.pads, self.kernel, self.dilation, self.stride, strict=True)
        sizes = [
            (size + sum(pad) - dilation * (kernel - 1) - 1) // stride + 1
            for size, pad, kernel, dilation, stride in sides
        ]

        def cut(places: "torch.Tensor") -> "torch.Tensor":
            padded = x.detach()
            if any(map(sum, self.pads)):
                mode = "constant" if self.mode == "zeros" else self.mode
                flat = [size for pad in reversed(self.pads) for size in pad]
                padded = torch.nn.functional.pad(padded, flat, mode=mode)
            index, rest = [], places
            for axis in reversed(range(axes)):
                start = (rest % sizes[axis]) * self.stride[axis]
                rest = rest // sizes[axis]
                taps = torch.arange(self.kernel[axis], device=places.device) * self.dilation[axis]
                # One axis of the kernel each, behind rows and channels.
                shape = [1, 1, *(self.kernel[a] if a == axis else 1 for a in range(axes))]
                index.append(start.reshape(-1, 1, *[1] * axes) + taps.reshape(shape))
            batch = rest.reshape(-1, 1, *[1] * axes)
            channel = torch.arange(channels, device=places.device)
            channel = channel.reshape(1, -1, *[1] * axes)
            return padded[(batch, channel, *reversed(index))].reshape(len(places), width)

        return x.shape[0] * math.prod(sizes), width, cut


def _patches_of(module: Any) -> Patches:
    kernel, dilation = tuple(module.kernel_size), tuple(module.dilation)
    if module.padding == "same":
        spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = tuple((span // 2, span - span // 2) for span in spans)
    elif isinstance(module.padding, str):
        pads = ((0, 0),) * len(kernel)
    else:
        pads = tuple((int(size), int(size)) for size in module.padding)
    return Patches(
        kernel=kernel,
        stride=tuple(module.stride),
        dilation=dilation,
        pads=pads,
        mode=module.padding_mode,
    )


def weights_of_modules(model: "torch.nn.Module") -> dict[str, GemmWeight]:
    """Every weight of a module that is one matrix product, by name, in the order of definition.

    Names are those without ``torch.compile``.
    """
    import torch

    linear = find_linear_layers(model)
    # Its weight is read by a function of the attention around it: no hook sees its input.
    unseen = torch.nn.modules.linear.NonDynamicallyQuantizableLinear
    found: dict[str, GemmWeight] = {}
    adapted: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if adapted and name.startswith(adapted):
            continue
        if _is_adapted(module):
            adapted = (*adapted, f"{name}.")
            base: Any = module.base_layer
            made = weights_of_modules(base).get("model")
            if made is not None:
                weight = partial(_merged, module, made.weight)
                found[_bare(name)] = replace(made, module=module, weight=weight)
            continue
        name = _bare(name) or "model"
        kind = torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d
        if isinstance(module, kind):
            if module.groups == 1 and not _is_transposed(module):
                found[name] = GemmWeight(
                    module=module,
                    weight=partial(_flattened, module),
                    bias=module.bias,
                    rows=_patches_of(module),
                )
        elif linear.get(name) is module and not isinstance(module, unseen):
            bias: Any = getattr(module, "bias", None)
            found[name] = GemmWeight(
                module=module,
                weight=partial(weight_of, module),
                bias=bias() if callable(bias) else bias,
            )
        elif _is_turned_linear(module):
            found[name] = GemmWeight(
                module=module, weight=partial(_turned, module), bias=getattr(module, "bias", None)
            )
    return found


def _is_adapted(module: Any) -> bool:
    """Whether it is a layer of PEFT: its own around a `base_layer`."""
    return hasattr(module, "base_layer") and callable(getattr(module, "get_delta_weight", None))


def _merged(module: Any, weight: "Callable[[], torch.Tensor]") -> "torch.Tensor":
    """The weight of a layer of PEFT with its active adapters, as they run beside it."""
    whole = weight().detach().float()
    if getattr(module, "merged", False) or getattr(module, "disable_adapters", False):
        return whole
    for adapter in getattr(module, "active_adapters", ()):
        if adapter not in getattr(module, "lora_A", {adapter: None}):
            continue
        if getattr(module, "use_dora", {}).get(adapter):
            raise DumpError(f"adapter {adapter!r} is DoRA; merge it first (merge_and_unload())")
        whole = whole + module.get_delta_weight(adapter).detach().float().reshape(whole.shape)
    return whole


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _flattened(module: Any) -> "torch.Tensor":
    return weight_of(module).flatten(1)


def _turned(module: Any) -> "torch.Tensor":
    return module.weight.T


def _is_transposed(module: Any) -> bool:
    return bool(getattr(module, "transposed", False))


def _is_turned_linear(module: Any) -> bool:
    """Whether it is transformers' ``Conv1D``, or a copy of it: a Linear whose weight is (K, N)."""
    weight: Any = getattr(module, "weight", None)
    return (
        type(module).__name__ == "Conv1D"
        and getattr(weight, "ndim", 0) == 2
        and getattr(module, "nf", None) == weight.shape[1]
    )


# What is given the function and its arguments says (x, weight, bias, weight is (K, N)).
_Call = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor | None", bool]
_MATRICES = ("matmul", "__matmul__", "mm", "bmm", "_grouped_mm", "grouped_mm")
_SUMS = ("addmm", "baddbmm")


class FunctionWeights:
    """Parameters of a model that no module of `seen` multiplies with, found when functions do.

    Parameters
    ----------
    model : torch module
    seen : mapping of name to GemmWeight
        As from `weights_of_modules`.

    Attributes
    ----------
    names : list of str
        Layers that may be found, and of those only the ones that are told of.
    """

    def __init__(self, model: "torch.nn.Module", seen: Mapping[str, GemmWeight]) -> None:
        watched = {
            id(parameter)
            for one in seen.values()
            for parameter in one.module.parameters(recurse=_is_adapted(one.module))
        }
        self._by_storage: dict[int, tuple[str, torch.Tensor]] = {}
        for name, values in model.named_parameters():
            # What is quantized, or has no memory of its own, lies nowhere that tells it.
            if id(values) in watched or values.ndim not in (2, 3) or not _is_plain(values):
                continue
            self._by_storage[values.untyped_storage().data_ptr()] = (_layer_name(name), values)
        self.names = [
            f"{name}.{number}" if values.ndim == 3 else name
            for name, values in self._by_storage.values()
            for number in range(len(values) if values.ndim == 3 else 1)
        ]

    @contextmanager
    def watched(self, fire: Callable[[str, GemmWeight, Any], None]) -> Iterator[None]:
        """Within the block, tell `fire` the layer, its weight and its input of every product."""
        if not self._by_storage:
            yield
            return
        import torch
        from torch.overrides import TorchFunctionMode

        watch = self._watch

        class Watching(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
                watch(getattr(func, "__name__", ""), args, kwargs or {}, fire)
                return func(*args, **(kwargs or {}))

        functional: Any = torch.nn.functional
        linear = functional.linear

        def watched_linear(input: Any, weight: Any, bias: Any = None) -> Any:
            self._tell((input, weight, bias, False), fire)
            return linear(input, weight, bias)

        # Functions written in Python call it by its name; a mode does not see into them.
        was_fast = torch.backends.mha.get_fastpath_enabled()
        functional.linear = watched_linear
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with Watching():
                yield
        finally:
            functional.linear = linear
            torch.backends.mha.set_fastpath_enabled(was_fast)

    def _watch(
        self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], fire: Callable
    ) -> None:
        if name in _MATRICES and len(args) > 1:
            offsets = args[2] if len(args) > 2 else kwargs.get("offs")
            self._tell((args[0], args[1], None, True), fire, offsets)
        elif name in _SUMS and len(args) > 2:
            self._tell((args[1], args[2], args[0], True), fire)

    def _tell(self, call: _Call, fire: Callable, offsets: Any = None) -> None:
        x, weight, bias, is_turned = call
        if not (_is_plain(weight) and _is_plain(x)) or weight.ndim not in (2, 3):
            return
        found = self._by_storage.get(weight.untyped_storage().data_ptr())
        if found is None or weight.shape[-2 if is_turned else -1] != x.shape[-1]:
            return
        name, parameter = found
        wanted = set(self.names)
        matrices = [weight] if weight.ndim == 2 else list(weight)
        for number, matrix in enumerate(matrices):
            rows = matrix.T if is_turned else matrix
            part = _part_of(name, parameter, rows)
            if part is None or not {part, part.rpartition(".")[0]} & wanted:
                continue
            one = GemmWeight(
                module=None,
                weight=partial(_itself, rows),
                bias=bias if _is_vector(bias, len(rows)) else None,
            )
            fire(part, one, x if weight.ndim == 2 else _of_expert(x, number, offsets))


def _itself(rows: "torch.Tensor") -> "torch.Tensor":
    return rows


def _is_plain(values: Any) -> bool:
    import torch

    return (
        isinstance(values, torch.Tensor)
        and type(values) in (torch.Tensor, torch.nn.Parameter)
        and values.layout == torch.strided
        and values.is_floating_point()
        and not values.is_meta
    )


def _is_vector(bias: Any, n: int) -> bool:
    return _is_plain(bias) and bias.numel() == n


def _of_expert(x: Any, number: int, offsets: Any) -> Any:
    if x.ndim == 3:
        return x[number]
    if offsets is None:
        return x
    return x[int(offsets[number - 1]) if number else 0 : int(offsets[number])]


def _layer_name(name: str) -> str:
    """The layer that a checkpoint makes of a parameter: ``attn.in_proj_weight`` is its in_proj."""
    return _bare(name).removesuffix(".weight").removesuffix("_weight")


def _part_of(name: str, parameter: "torch.Tensor", rows: "torch.Tensor") -> str | None:
    """Name of the part of a parameter that `rows` (N, K) are a view of; None if of no such part."""
    start = int(rows.storage_offset()) - int(parameter.storage_offset())
    if parameter.ndim == 3:
        number, rest = divmod(start, parameter[0].numel())
        is_whole = rest == 0 and rows.numel() == parameter[0].numel()
        return f"{name}.{number}" if is_whole and number < len(parameter) else None
    if rows.numel() == parameter.numel():
        return name
    n, k = parameter.shape
    first, rest = divmod(start, k)
    last = first + len(rows)
    if rest or rows.shape[1] != k or rows.stride() != parameter.stride() or last > n:
        return None
    third = n // 3
    if name.endswith("in_proj") and n % 3 == 0 and first % third == last % third == 0:
        return f"{name}.{'qkv'[first // third : last // third]}"
    return f"{name}.{first}:{last}"


def left_out_of_capture(model: "torch.nn.Module", recorded: Mapping[str, GemmWeight]) -> str:
    """One sentence on weights that were not recorded; empty where there are none."""
    places = {one.weight().untyped_storage().data_ptr() for one in recorded.values()}
    # The factors of an adapter are in the weight that they change.
    adapted = tuple(f"{name}." for name, module in model.named_modules() if _is_adapted(module))
    weights = {
        name: x
        for name, x in model.named_parameters()
        if x.ndim > 1 and not (adapted and name.startswith(adapted))
    }
    others = {
        name: x for name, x in weights.items() if x.untyped_storage().data_ptr() not in places
    }
    if not others:
        return ""
    largest = max(others, key=lambda name: others[name].numel())
    share = 100 * sum(map(_size, others.values())) / sum(map(_size, weights.values()))
    return (
        f"left out: {counted(len(others), 'tensor')} with {share:.3g} % of the weights, such as "
        f"{largest}: {_why(model, largest)}"
    )


def _size(values: "torch.Tensor") -> int:
    return values.numel()


def _why(model: "torch.nn.Module", name: str) -> str:
    import torch

    module: Any = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, torch.nn.Embedding):
        return "a table that is looked up, not multiplied with"
    if _is_transposed(module):
        return "a transposed convolution is no single matrix product"
    if getattr(module, "groups", 1) > 1:
        return "a convolution in groups is no single matrix product"
    return "no product with it was seen"
