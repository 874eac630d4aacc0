"""Adapters (LoRA) beside the weights they change: merged where that is certain, else refused.

A pair of factors, down (r, K) and up (N, r), adds ``scale * up @ down`` to the weight (N, K) of a
layer. Pairs stand in the checkpoint itself, beside ``<layer>.base_layer`` as PEFT saves them, or in
a file of their own (``--lora FILE``). They are named as PEFT, diffusers (also of old) and kohya's
trainers name them; names are matched without wrappers, and flattened ones (``lora_unet_a_b``) by
what the layers' names become when they are flattened too.

The scale is alpha / r: ``<layer>.alpha`` in the file, or ``lora_alpha`` of the
``adapter_config.json`` beside it (with ``alpha_pattern``, and alpha / sqrt(r) for ``use_rslora``).
Where neither is there it is 1 in a file of its own, as diffusers and kohya's programs take it. In
files of PEFT, and beside the weights, it is not known then: they are refused until it is given
(``--lora FILE=SCALE``, which else is a strength besides).

DoRA, LoHa, LoKr, GLoRA, OFT, VeRA, IA3 and stored differences change weights in other ways, or by
rules that are not in the file: their layers are refused, with how to merge them.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loraq_sim.dumps.checkpoint_folder import read_config
from loraq_sim.dumps.stored import StoredDump, StoredLayer, StoredTensor
from loraq_sim.errors import DumpError, InputError, counted

__all__ = ["parse_lora", "with_adapters"]

_WEIGHT = r"(?:\.weight)?"
# PEFT, diffusers (also of old) and kohya name the factors of LoRA so.
_FACTOR = re.compile(
    r"(?P<base>.+?)(?:\.processor)?(?:\.(?P<member>\w+)_lora\.(?P<old>down|up)"
    r"|\.lora_(?P<role>[AB]|down|up)|\.lora(?:_linear_layer)?\.(?P<layer>down|up))"
    r"(?P<adapter>\.(?!weight$)[^.]+)??" + _WEIGHT
)
# Tensors of other adapters (PEFT, LyCORIS); a base whose name ends so is none of theirs.
_OTHER = re.compile(
    r"(?P<base>.+?)\.(?:hada_[wt][12](?:_[ab])?|lokr_[wt][12](?:_[ab])?|lora_mid"
    r"|lora_magnitude_vector|dora_scale|b?oft_(?:blocks|diag|R|S|s)|vera_lambda_[bd]|ia3_l"
    r"|on_input|diff|diff_b)(?:\.[^.]+)*"
)
_GLORA = ("a1", "a2", "b1", "b2")
# Trainers that flatten names with underscores put one of these in front.
_FLAT = re.compile(r"(?:lora|lycoris)_(?:unet_|transformer_|te\d?_)?")
_WRAPPED = re.compile(
    r"(?:(?:base_model|model|transformer|unet|diffusion_model|module|_orig_mod)\.)+"
)
_TEXT = re.compile(r"text_encoder|lora_te|te\d?_|text_model")
_PEFT = re.compile(r"base_model\.model\.")
_ROLES = {"A": "down", "down": "down", "B": "up", "up": "up"}
_MERGE = (
    "merge the adapter into it and save again (peft: model.merge_and_unload(); diffusers: "
    "pipe.fuse_lora(), pipe.unload_lora_weights())"
)
_UNMERGED = f"holds the weight without its adapter, which is no plain LoRA; {_MERGE}"
_UNSCALED = (
    "holds the weight without its adapter (LoRA), and nothing says how strongly that counts "
    "(lora_alpha / rank); put its adapter_config.json beside the file, give --lora FILE=SCALE with "
    f"this file, or {_MERGE}"
)


@dataclass(kw_only=True)
class _Pair:
    """Factors of one layer as they stand in a file, and what stands beside them."""

    parts: dict[str, StoredTensor] = field(default_factory=dict)
    alpha: StoredTensor | None = None
    is_peft: bool = False

    @property
    def rank(self) -> int:
        return self.parts["down"].shape[0]


def parse_lora(text: str) -> tuple[Path, float | None]:
    """File and strength of ``FILE`` or ``FILE=SCALE``.

    Raises
    ------
    InputError
        If the strength is no finite number.
    """
    path, equals, number = text.rpartition("=")
    if not equals or Path(text).exists():
        return Path(text), None
    try:
        scale = float(number)
    except ValueError:
        scale = math.nan
    if not (path and math.isfinite(scale)):
        raise InputError(f"lora {text!r:.100}: expected FILE or FILE=SCALE, such as style.pt=0.8")
    return Path(path), scale


def with_adapters(
    path: Path,
    stored: StoredDump,
    given: Sequence[tuple[Path, float | None]],
    read: Callable[[Path], tuple[dict[str, StoredTensor], tuple[Path, ...]]],
) -> StoredDump:
    """`stored` with the adapters in it, and the given ones, merged into its layers.

    Parameters
    ----------
    path : Path
        Of the checkpoint.
    stored : StoredDump
    given : sequence of (Path, float or None)
        Files of adapters, merged one after the other; the checkpoint itself stands for the strength
        of those in it.
    read : callable
        Gives the tensors of a file, and the files that hold them.

    Raises
    ------
    DumpError
        If a given file holds no adapter, one of another kind or model, or does not say its scale.
    """
    own = {file: scale for file, scale in given if _is_same(file, path)}
    before = stored
    stored = _with_own(path, stored, next(iter(own.values()), None))
    if stored is before and own:
        raise DumpError(f"{path}: holds no factors of an adapter (LoRA)")
    if not stored.layers and stored is not before:
        raise DumpError(
            f"{path}: holds an adapter (LoRA) and not the weights that it changes; give their "
            f"checkpoint, and --lora {path} beside it"
        )
    for file, scale in given:
        if file in own:
            continue
        tensors, files = read(file)
        pairs, others = _pairs(tensors)
        if others:
            raise DumpError(
                f"{file}: holds an adapter of another kind than LoRA ({_shown(others[0])}); merge "
                "it with the program that made it, and give the merged checkpoint"
            )
        if not pairs:
            raise DumpError(f"{file}: holds no factors of an adapter (LoRA)")
        stored = _with_file(file, stored, pairs, scale)
        stored = replace(stored, files=(*(stored.files or (path,)), *files))
    return stored


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _pairs(tensors: Mapping[str, StoredTensor]) -> tuple[dict[str, _Pair], list[str]]:
    """Pairs by the name of what they change, and tensors of adapters that are no LoRA."""
    pairs: dict[str, _Pair] = {}
    alphas: dict[str, StoredTensor] = {}
    others = []
    for key, tensor in tensors.items():
        if match := _FACTOR.fullmatch(key):
            base = ".".join(filter(None, (match["base"], match["member"])))
            pair = pairs.setdefault(base, _Pair())
            role = match["role"] or match["old"] or match["layer"]
            pair.parts[_ROLES[role]] = tensor
            # A named adapter is PEFT's own; diffusers leaves the name out.
            pair.is_peft |= match["adapter"] is not None or _PEFT.match(key) is not None
        elif key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha")] = tensor
        elif _OTHER.fullmatch(key):
            others.append(key)
    for base, pair in pairs.items():
        pair.alpha = alphas.get(base)
    return pairs, others


def _scale(
    file: Path, base: str, pair: _Pair, strength: float | None, usual: float | None
) -> float | None:
    """What the product of a pair is multiplied with, `usual` where nothing says it."""
    times = 1.0 if strength is None else strength
    if pair.alpha is not None and math.prod(pair.alpha.shape) == 1:
        return times * float(np.asarray(pair.alpha.load(), np.float32).reshape(())) / pair.rank
    config = read_config((file if file.is_dir() else file.parent) / "adapter_config.json")
    alpha = _of_pattern(config.get("alpha_pattern"), base, config.get("lora_alpha"))
    if isinstance(alpha, int | float):
        if config.get("use_dora") or config.get("peft_type", "LORA") != "LORA":
            raise DumpError(f"{file}: its adapter_config.json describes no plain LoRA; {_MERGE}")
        return times * alpha / (pair.rank**0.5 if config.get("use_rslora") else pair.rank)
    return usual if strength is None else times


def _of_pattern(patterns: object, base: str, usual: object) -> object:
    """The alpha of a layer: PEFT's patterns are ends of names, or regular expressions."""
    if not isinstance(patterns, Mapping):
        return usual
    ends = (alpha for name, alpha in patterns.items() if f".{base}".endswith(f".{name}"))
    return next(ends, usual)


def _layers_by_base(layers: Iterable[str], aliases: Mapping[str, str]) -> dict[str, str]:
    """Layers by the names, whole and flattened, that adapters call them by."""
    found: dict[str, str] = {}
    for name in layers:
        plain = name.removesuffix(".base_layer")
        for known in (plain, plain.removesuffix(".0")):
            found.setdefault(known, name)
            found.setdefault(known.replace(".", "_"), name)
    return {whole: name for whole, name in aliases.items() if name in layers} | found


def _layer_of(base: str, layers: Mapping[str, str]) -> str | None:
    bare = _WRAPPED.sub("", base, count=1) if _WRAPPED.match(base) else base
    flat = _FLAT.sub("", base, count=1) if _FLAT.match(base) else base
    return next((layers[name] for name in (base, bare, flat) if name in layers), None)


def _with_file(
    file: Path, stored: StoredDump, pairs: Mapping[str, _Pair], strength: float | None
) -> StoredDump:
    known = _layers_by_base(stored.layers, stored.aliases)
    layers, scales, of_text, unknown = dict(stored.layers), [], 0, []
    for base, pair in pairs.items():
        name = _layer_of(base, known)
        if name is None:
            of_text += bool(_TEXT.match(base))
            if not _TEXT.match(base):
                unknown.append(base)
            continue
        if len(pair.parts) != 2:
            raise DumpError(
                f"{file}: {_shown(base)!r} has one factor of two; the file is incomplete"
            )
        scale = _scale(file, base, pair, strength, None if pair.is_peft else 1.0)
        if scale is None:
            raise DumpError(
                f"{file}: does not say how strongly it counts (lora_alpha / rank); put its "
                f"adapter_config.json beside it, or give --lora {file}=SCALE"
            )
        problem = _misfit(layers[name], pair)
        if problem:
            raise DumpError(f"{file}: {_shown(base)!r}: {problem}; it is of another model")
        layers[name] = _merged(layers[name], pair, scale)
        scales.append(scale)
    if unknown:
        raise DumpError(
            f"{file}: {len(unknown)} of its {counted(len(pairs), 'pair')} of factors are for "
            f"layers that the checkpoint does not have, such as {_shown(unknown[0])}; the adapter "
            "is of another model, or of its fused layers"
        )
    text = f"; {counted(of_text, 'pair')} of text encoders left out" if of_text else ""
    said = f"merged: {file.name}, into {counted(len(scales), 'layer')}, {_range(scales)}{text}"
    return _telling(replace(stored, layers=layers), said)


def _with_own(path: Path, stored: StoredDump, strength: float | None) -> StoredDump:
    """Pairs within a checkpoint, merged into their layers and taken out of them."""
    held: dict[str, StoredTensor] = {
        name: layer.weight for name, layer in stored.layers.items() if layer.weight is not None
    }
    pairs, _ = _pairs(held | {key: x for key, x in stored.others.items() if key.endswith(".alpha")})
    known = _layers_by_base((x for x in stored.layers if not _is_part(x)), stored.aliases)
    changed = {_changed_otherwise(x, stored.layers) for x in stored.layers} - {""}
    changed |= {match["base"] for x in stored.skipped if (match := _OTHER.fullmatch(x))}
    parts = [x for x in stored.layers if _is_part(x) or _changed_otherwise(x, stored.layers)]
    if not (pairs or changed):
        return stored
    layers = {name: layer for name, layer in stored.layers.items() if name not in parts}
    scales, plain = [], {name: name for name in layers}
    for base, pair in pairs.items():
        name = _layer_of(base, known) or ""
        if name not in layers or base in changed:
            continue
        scale, problem = None, "a factor of its adapter is missing"
        if len(pair.parts) == 2:
            scale, problem = _scale(path, base, pair, strength, None), _misfit(layers[name], pair)
        if scale is None or problem:
            problem = layers[name].problem or problem or _UNSCALED
            layers[name] = replace(layers[name], problem=problem)
            continue
        layers[name] = _merged(layers[name], pair, scale)
        plain[name] = name.removesuffix(".base_layer")
        scales.append(scale)
    for base in changed:
        if (name := _layer_of(base, known) or "") in layers:
            layers[name] = replace(layers[name], problem=layers[name].problem or _UNMERGED)
    layers = {plain[name]: replace(x, name=plain[name]) for name, x in layers.items()}
    aliases = {whole: plain.get(name, name) for whole, name in stored.aliases.items()}
    aliases |= {name: short for name, short in plain.items() if name != short}
    stored = replace(
        stored,
        layers=layers,
        aliases=aliases,
        skipped=stored.skipped | dict.fromkeys(parts, "a factor of an adapter (LoRA)"),
        others={key: x for key, x in stored.others.items() if not key.endswith(".alpha")},
    )
    if not parts:
        return stored
    of = f"{len(parts)} factors of adapters (LoRA)"
    if not scales:
        return _telling(stored, f"{of} are no layers, such as {parts[0]:.100}")
    return _telling(stored, f"{of} merged into {counted(len(scales), 'layer')}, {_range(scales)}")


def _is_part(name: str) -> bool:
    return _FACTOR.fullmatch(name) is not None


def _changed_otherwise(name: str, layers: Mapping[str, StoredLayer]) -> str:
    """The layer that a tensor of another adapter than LoRA changes; empty if `name` is none."""
    if match := _OTHER.fullmatch(name):
        return match["base"]
    base, _, last = name.rpartition(".")
    is_glora = last in _GLORA and all(f"{base}.{one}" in layers for one in _GLORA)
    return base if is_glora else ""


def _misfit(layer: StoredLayer, pair: _Pair) -> str:
    """Why a pair cannot be added to a layer's weight; empty if it can."""
    down, up = (pair.parts[role].shape for role in ("down", "up"))
    if layer.weight is None:
        return layer.problem
    n, k = layer.weight.shape[0], math.prod(layer.weight.shape[1:])
    if not (len(down) > 1 and len(up) > 1 and 0 < down[0] == math.prod(up[1:])):
        return f"factors of {down!r:.60} and {up!r:.60} have no common rank"
    if (up[0], math.prod(down[1:])) != (n, k):
        return f"factors of {up!r:.60} and {down!r:.60} do not fit the weight ({n}, {k})"
    return ""


def _merged(layer: StoredLayer, pair: _Pair, scale: float) -> StoredLayer:
    weight = layer.usable_weight()
    down, up = pair.parts["down"], pair.parts["up"]
    return replace(
        layer,
        weight=StoredTensor(
            key=f"{weight.key}+{down.key}",
            shape=weight.shape,
            dtype="float32",
            stored_as=f"{weight.stored_as or weight.dtype} + LoRA",
            nbytes=weight.nbytes + down.nbytes + up.nbytes,
            load=partial(_sum, weight, down, up, scale),
        ),
    )


def _sum(
    weight: StoredTensor, down: StoredTensor, up: StoredTensor, scale: float
) -> NDArray[np.float32]:
    rank = down.shape[0]
    # What is not finite is refused with the layer.
    with np.errstate(invalid="ignore", over="ignore"):
        return _product(weight, down, up, scale, rank)


def _product(
    weight: StoredTensor, down: StoredTensor, up: StoredTensor, scale: float, rank: int
) -> NDArray[np.float32]:
    left = up.load().astype(np.float32).reshape(-1, rank)
    right = down.load().astype(np.float32).reshape(rank, -1)
    product = np.float32(scale) * (left @ right)
    return weight.load().astype(np.float32) + product.reshape(weight.shape)


def _shown(name: str) -> str:
    """A name of a stranger's, as a terminal may see it."""
    return repr(name[:100])[1:-1]


def _range(scales: Sequence[float]) -> str:
    low, high = min(scales), max(scales)
    return f"times {low:.4g}" if low == high else f"times {low:.4g} to {high:.4g}"


def _telling(stored: StoredDump, said: str) -> StoredDump:
    return replace(stored, left_out="; ".join(filter(None, (stored.left_out, said))))
