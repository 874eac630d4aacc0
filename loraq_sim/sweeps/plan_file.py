"""What a sweep is asked for: the plan as a record, and as a TOML file that is checked key by key.

    dump = "minilm.pt"                  # beside the plan file
    hw = ["aie2", "a100"]
    splits = ["W4A4", "W4A4+W8A8r8"]
    seeds = [0, 1]

    [datapath]                          # every combination of these is a case
    acc_bits = [16, 24]                 # or "14..32"

    [[override]]                        # layers by name or kind
    layers = "ffn_*"
    rank = 16

Every key of the tables is in `PLAN_KEYS`; ``key=value`` texts change them afterwards. Messages name
the file, the line and the key.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from loraq_sim.errors import InputError, unknown_name
from loraq_sim.files import line_of, read_toml, toml_value
from loraq_sim.settings import (
    DATAPATH_KEYS,
    OVERRIDE_KEYS,
    Override,
    checked_override,
    grid_values,
    parse_rows,
)

__all__ = [
    "PLAN_KEYS",
    "SweepPlan",
    "SweepSettings",
    "checked_values",
    "plan_from_values",
    "plan_of_call",
    "read_plan_values",
    "set_values",
]


PLAN_KEYS = {
    "dump": "text",
    "out": "text",
    "hw": "texts",
    "layers": "texts",
    "splits": "texts",
    "methods": "texts",
    "presets": "texts",
    "seeds": "integers",
    "family": "text",
    "group": "integer",
    "tokens": "integer",
    "synthesize_inputs": "truth",
    "lora": "texts",
    "smooth": "number",
    "rotate": "text",
    "condition": "text",
    "finish": "text",
    "rows": "rows",
    "model": "text",
    "resolution": "integer",
    "batch": "integer",
    "fused": "truth",
    "kernel": "text",
    "datapath": "table",
    "override": "tables",
}
"""Keys of a plan file and what they hold; one value stands for a list of it."""

_WHAT = {
    "text": "a string",
    "texts": "a list of strings",
    "integers": "a list of whole numbers",
    "integer": "a whole number",
    "number": "a number",
    "rows": "a whole number, 'PATTERN=NUMBER', or a list of them",
    "truth": "true or false",
    "table": "a table",
    "tables": "a list of tables, each under [[override]]",
}
# What a sweep writes is no part of what it computes.
_NOT_PLANNED = ("out",)
# Whoever controls a scheduler runs programs as the user; a plan may come from anyone.
_COMMAND_LINE_ONLY = {
    "scheduler": "--scheduler",
    "scheduler_options": "--scheduler-option",
}
_TYPES = {
    "text": str,
    "texts": str,
    "integers": int,
    "integer": int,
    "number": (int, float),
    "truth": bool,
}
_FIELDS = {
    "hw": "accelerators",
    "presets": "preset",
    "seeds": "seed",
    "override": "overrides",
}


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """What a sweep is asked for.

    Parameters
    ----------
    dump : str
        Path of the layer dump.
    accelerators : tuple of str
        Names or paths of YAML files.
    layers : tuple of str
        Patterns of layer names or kinds; all layers when empty.
    splits : tuple of str
        Precision splits; `default_splits` when empty.
    methods, preset, seed, smooth, rotate, condition, finish
        See `loraq_sim.solve`; a tuple of presets or seeds asks for each of them.
    family, group
        Element family and group of the splits.
    tokens : int, optional
        Activation rows to use; all by default.
    synthesize_inputs : bool
        Draw `tokens` input rows (256 by default) for each layer that the dump has none of.
    lora : tuple of str
        Adapters merged into the weights, ``FILE`` or ``FILE=SCALE``.
    rows : mapping
        Rows M of one call by pattern of layer names or kinds, the last that matches.
    model, resolution : str and int, optional
        A published model (`loraq_sim.dumps.kinds`) and an image side in pixels, which give the
        rows of the other layers. A resolution alone is that of the model whose class the config
        beside the checkpoint names. Without either the dump, or that config, says them.
    batch : int
        Images of one call: multiplies the rows, wherever they come from.
    fused : bool
        Whether the cost model runs the branch inside the main kernel.
    kernel : str, optional
        Kernel family of the accelerators for every kernel; by default the one that it gets.
    datapath : mapping
        Overrides of the accelerators' data paths; a tuple of values asks for each of them.
    overrides : tuple of Override
        Settings of layers by name or kind; of two that match, the later one wins.
    """

    dump: str
    accelerators: tuple[str, ...]
    layers: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("loraq",)
    preset: str | tuple[str, ...] = "balanced"
    family: str = "int"
    group: int = 64
    tokens: int | None = None
    synthesize_inputs: bool = False
    lora: tuple[str, ...] = ()
    seed: int | tuple[int, ...] = 0
    smooth: float | None = None
    rotate: str | None = None
    condition: str | None = None
    finish: str | None = None
    rows: Mapping[str, int] = field(default_factory=dict)
    model: str | None = None
    resolution: int | None = None
    batch: int = 1
    fused: bool = True
    kernel: str | None = None
    datapath: Mapping[str, Any] = field(default_factory=dict)
    overrides: tuple[Override, ...] = ()

    @property
    def drawn_rows(self) -> bool | int:
        """What `loraq_sim.read_layer_dump` takes as `synthesize_inputs`."""
        return self.synthesize_inputs and (self.tokens or True)


class SweepSettings(TypedDict, total=False):
    """Keys of a plan that `loraq_sim.sweep` takes besides its own; one value or several."""

    layers: str | Sequence[str]
    methods: str | Sequence[str]
    presets: str | Sequence[str]
    seeds: int | Sequence[int]
    family: str
    group: int
    synthesize_inputs: bool
    lora: str | Sequence[str]
    smooth: float | None
    rotate: str | None
    condition: str | None
    finish: str | None
    rows: int | str | Sequence[int | str]
    model: str | None
    resolution: int
    batch: int
    fused: bool
    kernel: str | None
    datapath: Mapping[str, Any]
    override: Sequence[Mapping[str, Any]]


def read_plan_values(path: str | Path) -> dict[str, Any]:
    """Checked values of the plan file at `path`, by the keys of `PLAN_KEYS`.

    Paths (``dump``, and accelerators that end in .yaml or .yml) are relative to the file; ``out``
    is relative to the folder the program runs in.

    Raises
    ------
    InputError
        If the file cannot be read, is no TOML, or a key or value breaks a rule.
    """
    path = Path(path)
    text, content = read_toml(path, "plan")

    def where(key: str) -> str:
        return f"{path}:{line_of(text, key)}"

    values = {key: _checked(key, value, where) for key, value in content.items()}
    if "dump" in values:
        values["dump"] = str(path.parent / values["dump"])
    if "hw" in values:
        values["hw"] = tuple(
            str(path.parent / ref) if ref.endswith((".yaml", ".yml")) else ref
            for ref in values["hw"]
        )
    return values


def checked_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values given in Python, by the keys of `PLAN_KEYS`, checked as those of a file are.

    Raises
    ------
    InputError
        If a key or value breaks a rule.
    """
    return {key: _checked(key, value, lambda name: name) for key, value in values.items()}


def set_values(values: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """`values` changed by texts such as ``tokens=64``, ``hw=aie2,a100``, ``datapath.acc_bits=16``.

    Raises
    ------
    InputError
        If a text is not of this form, or its key or value breaks a rule.
    """
    changed = dict(values)
    for text in assignments:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not name:
            raise InputError(f"--set {text!r} must look like 'tokens=64' or 'datapath.acc_bits=16'")

        def where(_key: str, text: str = text) -> str:
            return f"--set {text!r}"

        key, _, inner = name.partition(".")
        if inner and key == "datapath":
            table = dict(changed.get(key, {})) | {inner: _parsed(value)}
            changed[key] = _checked(key, table, where)
        else:
            # A key that no plan has is named in full, but for a table that only flags can give.
            name = key if key in _COMMAND_LINE_ONLY else name
            changed[name] = _checked(name, _parsed(value), where)
    return changed


def plan_from_values(values: Mapping[str, Any]) -> SweepPlan:
    """The plan that checked values describe.

    Raises
    ------
    InputError
        If the dump or the accelerators are missing.
    """
    for key, flag in (("dump", "--layer-dump"), ("hw", "--hw")):
        if not values.get(key):
            raise InputError(f"no {key}: give {flag}, or {key} = ... in the --plan file")
    fields = {_FIELDS.get(key, key): value for key, value in values.items()}
    fields = {key: value for key, value in fields.items() if key not in _NOT_PLANNED}
    for key in ("preset", "seed"):
        # One value is kept as one value, so that plans read alike however they were given.
        if key in fields and len(fields[key]) == 1:
            fields[key] = fields[key][0]
    return SweepPlan(**fields)


def _checked(key: str, value: Any, where: Any) -> Any:
    if key in _COMMAND_LINE_ONLY:
        raise InputError(
            f"{where(key)}: {key} is no key of a plan: where a sweep runs is said on the command "
            f"line alone, with {_COMMAND_LINE_ONLY[key]}"
        )
    if key not in PLAN_KEYS:
        raise InputError(f"{where(key)}: {unknown_name('key', key, PLAN_KEYS)}")
    kind = PLAN_KEYS[key]
    try:
        if kind == "table":
            return _datapath(value, where)
        if kind == "tables":
            return tuple(_override(entry) for entry in _listed(value, dict))
        if kind == "rows":
            return parse_rows(map(str, _listed(value, (int, str))))
        if kind in ("texts", "integers"):
            return _listed(value, _TYPES[kind])
        if isinstance(value, list):
            raise TypeError
        (single,) = _listed(value, _TYPES[kind])
        return float(single) if kind == "number" else single
    except TypeError:
        raise InputError(f"{where(key)}: {key} must be {_WHAT[kind]}, got {value!r:.80}") from None
    except InputError as error:
        text = str(error)
        raise InputError(text if text.startswith(where(key)) else f"{where(key)}: {text}") from None


def _listed(value: Any, types: Any) -> tuple:
    found = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    for entry in found:
        # bool is an int to Python, not to a reader.
        if not isinstance(entry, types) or (isinstance(entry, bool) and types is not bool):
            raise TypeError
    return found


def _datapath(value: Any, where: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError
    for name in value:
        if name not in DATAPATH_KEYS:
            message = unknown_name("datapath setting", name, DATAPATH_KEYS)
            raise InputError(f"{where(name)}: {message}")
    return {
        name: tuple(entry) if isinstance(entry, list) else grid_values(name, entry)
        for name, entry in value.items()
    }


def _override(table: Mapping[str, Any]) -> Override:
    known = ("layers", *OVERRIDE_KEYS)
    for name in table:
        if name not in known:
            raise InputError(unknown_name("key", name, known) + " (in [[override]])")
    if not isinstance(table.get("layers"), str) or len(table) < 2:
        raise InputError("an [[override]] needs layers = 'PATTERN' and at least one setting")
    settings = {name: value for name, value in table.items() if name != "layers"}
    return checked_override(table["layers"], settings, f"override {table['layers']!r}")


def _parsed(text: str) -> Any:
    """A TOML value, or a comma-separated list of bare words and numbers."""
    try:
        return toml_value(text, "--set")
    except InputError:
        if text[:1] in "[{\"'":
            raise InputError(f"--set: {text!r:.80} is not a TOML value") from None
    parts = [part.strip() for part in text.split(",")]
    values = [int(part) if re.fullmatch(r"-?\d{1,18}", part) else part for part in parts]
    return values if len(values) > 1 else values[0]


def plan_of_call(
    dump: str | Path, hw: str | Path | Iterable[str | Path], **settings: Any
) -> SweepPlan:
    """The plan of `loraq_sim.sweep`: values one by one or in sequences, None and empty left out.

    Raises
    ------
    InputError
        If a key is unknown, or a value of it not possible.
    """
    if not isinstance(dump, str | Path):
        raise InputError(
            f"dump must be the path of a layer dump, which workers open themselves, got {dump!r}; "
            "lq.write_layer_dump(PATH, layers) writes one"
        )
    asked: dict[str, Any] = {"dump": str(dump), "hw": _machines(hw)} | settings
    asked["splits"] = _texts(settings.get("splits") or ())
    plain = {name: tuple(v) if isinstance(v, list) else v for name, v in asked.items()}
    return plan_from_values(
        checked_values({name: value for name, value in plain.items() if value not in (None, ())})
    )


def _machines(hw: Any) -> tuple[str, ...]:
    several = hw if isinstance(hw, list | tuple | set) else (hw,)
    for one in several:
        if not isinstance(one, str | Path):
            raise InputError(
                "hw must be names of accelerators or paths of their files, got "
                f"{type(one).__name__}; a sketch goes into a file first: "
                "Path('my_npu.yaml').write_text(hwmodels.sketch_text(hw))"
            )
    if not several:
        raise InputError("a sweep needs an accelerator, such as hw='aie2'")
    return tuple(map(str, several))


def _texts(values: str | Path | Iterable[str | Path]) -> tuple[str, ...]:
    return (str(values),) if isinstance(values, str | Path) else tuple(map(str, values))
