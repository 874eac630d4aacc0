"""deepcompressor's checkpoint folder: what its own converter to nunchaku reads.

    model.pt   {NAME.weight: (N, K) fp16, the 4-bit part dequantized; NAME.bias}
    scale.pt   {NAME.weight.scale.0: (N, 1, K / 64, 1) fp16}
    smooth.pt  {NAME: (K,) fp16}
    branch.pt  {NAME: {a.weight: R (r, K), b.weight: L (N, r)}} fp16, on smoothed activations

Codes come back exactly: a weight is code * scale rounded to 11 bits, at most 2^-11 * 8 of a step
away from it. q, k and v that share R have one branch and one smoothing under the name of q, with
the rows of L below each other.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from loraq_sim.dumps.stored import first_line
from loraq_sim.dumps.torch_file import load_object
from loraq_sim.errors import InputError
from loraq_sim.files import make_folder, refuse_existing, replaced_file
from loraq_sim.formats import parse_format
from loraq_sim.nunchaku.checkpoint import FusedLayer, as_solution, fused_layers, split_layer
from loraq_sim.nunchaku.layer_tensors import (
    GROUP,
    MAIN_FORMAT,
    check_fits,
    plain_factor,
    stored_scales,
)
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.solvers import Solution
from loraq_sim.solvers.problem import Branches
from loraq_sim.solvers.solve import share_out

__all__ = ["read_deepcompressor", "write_deepcompressor"]

_FILES = ("model", "scale", "smooth", "branch")
_SCALE = ".weight.scale.0"


def write_deepcompressor(
    folder: str | Path,
    solutions: Mapping[str, Solution],
    *,
    biases: Mapping[str, np.ndarray | None] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the four files of a deepcompressor checkpoint into `folder`.

    Raises
    ------
    InputError
        If a layer is not int4/g64 with an fp16 branch, K is no multiple of 64, or files are there.
    """
    import torch

    folder = Path(folder)
    refuse_existing(*(folder / f"{name}.pt" for name in _FILES), overwrite=overwrite)
    if not solutions:
        raise InputError(f"{folder}: no solved layer to write")
    content: dict[str, dict[str, Any]] = {name: {} for name in _FILES}
    for layer in fused_layers(solutions, biases or {}):
        _add(content, layer)
    make_folder(folder)
    # None of the four takes its place before all are written.
    with ExitStack() as files:
        for name, tensors in content.items():
            torch.save(tensors, files.enter_context(replaced_file(folder / f"{name}.pt")))
    return folder


def _add(content: dict[str, dict[str, Any]], layer: FusedLayer) -> None:
    name, k = next(iter(layer.members)), layer.solution.main.shape[1]
    check_fits(name, layer.solution)
    if k % GROUP:
        raise InputError(
            f"layer {name!r}: K={k} is no multiple of {GROUP}, which deepcompressor needs; "
            "the nunchaku layout pads"
        )
    for member, (solution, bias) in split_layer(layer).items():
        scales = stored_scales(solution.main)
        content["model"][f"{member}.weight"] = _half(solution.main.dequantize())
        if layer.bias is not None:
            content["model"][f"{member}.bias"] = _half(bias)
        content["scale"][member + _SCALE] = _half(scales[:, None, :, None])
    solution = layer.solution
    if solution.smooth is not None:
        content["smooth"][name] = _half(solution.smooth)
    if solution.left is not None and solution.right is not None:
        left, right = solution.left.codes, solution.right.codes
        content["branch"][name] = {"a.weight": _half(right), "b.weight": _half(left)}


def read_deepcompressor(folder: str | Path) -> tuple[dict[str, Solution], dict[str, np.ndarray]]:
    """Solutions and biases by layer name of a checkpoint folder; no code of the files runs.

    Raises
    ------
    InputError
        If a file is missing or is no such file; the message names it.
    """
    folder = Path(folder)
    model, scale, smooth, branch = (_loaded(folder / f"{name}.pt", name) for name in _FILES)
    names = [key.removesuffix(_SCALE) for key in scale if key.endswith(_SCALE)]
    if not names:
        raise InputError(f"{folder / 'scale.pt'}: holds no key that ends in {_SCALE}")
    try:
        mains = {name: _main(name, model, scale[name + _SCALE]) for name in names}
        biases = {name: _bias(model, name, len(mains[name].codes)) for name in names}
        solutions: dict[str, Solution] = {}
        for home in names:
            members = {
                name: _solution(mains[name], left, right, smooth.get(home))
                for name, left, right in _branches(home, mains, branch)
            }
            common = ("right", "smooth") if len(members) > 1 else ()
            solutions |= share_out(members, common)
        return {name: solutions[name] for name in names}, biases
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: the checkpoint is damaged: {first_line(error)}") from None


def _loaded(path: Path, name: str) -> dict[str, Any]:
    if not path.is_file():
        if name in ("smooth", "branch"):
            return {}
        raise InputError(f"{path}: no such file")
    found = load_object(path)
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds a {type(found).__name__}, expected a dict of tensors")
    return found


def _main(name: str, model: dict[str, Any], scale: Any) -> QuantizedTensor:
    weight = model[f"{name}.weight"].float().numpy()
    weight = weight.reshape(len(weight), -1)
    scales = scale.float().numpy().reshape(len(weight), -1)
    if weight.shape[1] != GROUP * scales.shape[1]:
        raise InputError(
            f"layer {name!r}: a weight of {weight.shape} with {scales.shape[1]} scales a row is "
            f"not in groups of {GROUP}"
        )
    steps = np.repeat(scales, GROUP, axis=1)
    codes = np.rint(np.divide(weight, steps, out=np.zeros_like(weight), where=steps != 0))
    if not (np.isfinite(codes).all() and codes.min() >= -8 and codes.max() <= 7):
        raise InputError(f"layer {name!r}: the weight is not made of 4-bit codes of its scales")
    fmt = parse_format(MAIN_FORMAT)
    return QuantizedTensor(codes=codes.astype(np.int8), scales=scales, format=fmt)


def _bias(model: dict[str, Any], name: str, n: int) -> np.ndarray:
    bias = model.get(f"{name}.bias")
    return np.zeros(n, np.float32) if bias is None else bias.float().numpy()


def _branches(
    home: str, mains: Mapping[str, QuantizedTensor], branch: Mapping[str, Any]
) -> Iterator[tuple[str, QuantizedTensor | None, QuantizedTensor | None]]:
    """(layer, L, R) of the layers whose branch lies under the name `home`."""
    n = len(mains[home].codes)
    if home not in branch:
        first = f"{home.rpartition('.')[0]}.to_q"
        if home.endswith((".to_k", ".to_v")) and _is_common(first, mains, branch):
            return
        yield home, None, None
        return
    right = _plain(branch[home]["a.weight"])
    left = branch[home]["b.weight"]
    if len(left) == n:
        yield home, _plain(left), right
        return
    parent, start = home.rpartition(".")[0], 0
    for name in (home, f"{parent}.to_k", f"{parent}.to_v"):
        rows = len(mains[name].codes)
        yield name, _plain(left[start : start + rows]), right
        start += rows


def _is_common(home: str, mains: Mapping[str, QuantizedTensor], branch: Mapping[str, Any]) -> bool:
    return home in branch and len(branch[home]["b.weight"]) > len(mains[home].codes)


def _solution(
    main: QuantizedTensor, left: QuantizedTensor | None, right: QuantizedTensor | None, smooth: Any
) -> Solution:
    factors = None if smooth is None else smooth.float().numpy()
    return as_solution(Branches(main=main, left=left, right=right, smooth=factors))


def _plain(values: Any) -> QuantizedTensor:
    return plain_factor(values.half().numpy())


def _half(values: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float16))
