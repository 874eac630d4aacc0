"""A sweep as an object: run it or open its store, then ask for rows, front, verdict and report.

    study = lq.sweep("pixart.pt", hw="aie2", splits=["W4A4", "W4A4+W8A8@fp16r32"])
    print(study.verdict())

The command line's ``sweep`` is the same run and builds the same object, so that rows and verdict
are the same.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, cast

from loraq_sim.errors import DumpError, InputError, StoreError, counted, unknown_name
from loraq_sim.results.front import mark_front, per_layer_front
from loraq_sim.results.rows import ResultRow, Row
from loraq_sim.results.store import ResultStore, frame_of
from loraq_sim.results.store_records import check_possible
from loraq_sim.results.totals import ModelRow, model_totals
from loraq_sim.results.verdict import Verdict, verdict_of
from loraq_sim.version import __version__

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from loraq_sim.sweeps.plan import ComposedSweep
    from loraq_sim.sweeps.run import OnEvent, SweepOutcome

__all__ = ["Study", "SweepSettings", "open_study", "sweep"]

_STORE = "results.sqlite"
_PLACES = {"model": ("dump", "accelerator"), "layer": ("dump", "accelerator", "layer")}


class Study:
    """The rows of a sweep and what they say.

    Attributes
    ----------
    rows : list of ResultRow
        Dictionaries, one per layer, split and accelerator; `loraq_sim.results.rows.COLUMNS` says
        what each column means.
    path : Path or None
        The store; None where it was kept only while the sweep ran.
    notes : tuple of str
        What was decided while the sweep was planned, such as the default splits.
    outcome : SweepOutcome or None
        How the run ended: ``n_ok``, ``n_failed``, ``n_left``, ``interrupted``.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        runs: Sequence[dict[str, Any]] = (),
        *,
        path: Path | None = None,
        layers: Sequence[str] = (),
        notes: Sequence[str] = (),
        outcome: "SweepOutcome | None" = None,
        footer: Mapping[str, Any] | None = None,
    ) -> None:
        self._rows = list(rows)
        self.path = path
        self.notes = tuple(notes)
        self.outcome = outcome
        self._runs = list(runs)
        self._layers = tuple(layers) or tuple(dict.fromkeys(row["layer"] for row in rows))
        self._footer = dict(footer or {})

    @classmethod
    def of_sweep(
        cls,
        composed: "ComposedSweep",
        store: ResultStore,
        *,
        outcome: "SweepOutcome | None" = None,
    ) -> "Study":
        """The study of a plan's cases in `store`."""

        digests = {"dump": composed.dump_digest, **composed.accelerator_digests}
        return cls(
            store.rows(composed.case_ids),
            store.provenance(),
            path=store.path,
            layers=composed.layers,
            notes=composed.notes,
            outcome=outcome,
            footer={"loraq-sim": __version__, "seed": composed.plan.seed}
            | {name: digest[:12] for name, digest in digests.items()},
        )

    @property
    def rows(self) -> list[ResultRow]:
        """The rows as they are stored, in the order of the plan."""
        # The columns of a row are those of its type.
        return cast(list[ResultRow], self._rows)

    @cached_property
    def df(self) -> "pandas.DataFrame":
        """The rows as a DataFrame: missing numbers NaN, missing text None, ``pareto`` bool."""

        return frame_of(self._rows)

    @cached_property
    def totals(self) -> list[ModelRow]:
        """Totals of the model per split and accelerator, with ``pareto``; see `model_totals`."""
        marked = mark_front(self._sums, _objectives(self._verdict), by=_PLACES["model"])
        return cast(list[ModelRow], marked)

    def verdict(self) -> Verdict:
        """Which split to build, why, what ties with it and what would change it."""
        return self._verdict

    @cached_property
    def _sums(self) -> list[Row]:
        check_possible(self._rows, self.path or "study")
        return model_totals(self._rows, layers=self._layers)

    @cached_property
    def _verdict(self) -> Verdict:
        return verdict_of(self._sums)

    def front(self, by: str = "model") -> "pandas.DataFrame":
        """Rows that no other beats in error and cost, cheapest first, per accelerator.

        Parameters
        ----------
        by : str
            ``model`` for totals of the model, ``layer`` for each layer's rows.

        Raises
        ------
        InputError
            If `by` is neither.
        """
        import pandas

        if by not in _PLACES:
            raise InputError(unknown_name("front", by, _PLACES))
        frame = pandas.DataFrame(self.totals) if by == "model" else self.df
        if frame.empty:
            return frame
        return per_layer_front(frame, _objectives(self._verdict), by=_PLACES[by])

    def plot_front(self) -> "Figure":
        """Error against cost of the whole model, the verdict as the title; a matplotlib figure.

        Raises
        ------
        InputError
            If no cost of the model is known.
        """
        from loraq_sim.reporting.figures import pareto_figure

        verdict = self._verdict
        if not verdict.cost:
            raise InputError("there is nothing to draw: no split has an error and a cost")
        costs = [verdict.area or verdict.cost, verdict.cost if verdict.area else "weight_bytes"]
        costs = list(dict.fromkeys(costs))
        dumps = dict.fromkeys(str(row.get("dump")) for row in self._rows)
        return pareto_figure(
            self.totals,
            x=costs if len(verdict.on) == 1 else verdict.cost,
            y=verdict.error,
            model=", ".join(dumps),
            layers=len(self._layers),
            provenance=self._footer,
            verdict=verdict,
        )

    def report(self, path: str | Path, *, title: str | None = None, files: bool = False) -> Path:
        """Write the page of ``loraq-sim report`` to `path` and return it.

        Parameters
        ----------
        path : str or Path
            An HTML file; it is replaced.
        title : str, optional
            By default the names of the dumps.
        files : bool
            Whether pictures and tables are written beside it, into ``NAME_files``.

        Raises
        ------
        InputError
            If there is no row, the file cannot be written or an extra is not installed.
        StoreError
            If a row has a number that no layer or machine can have.
        """
        from loraq_sim.reporting.gather import gather
        from loraq_sim.reporting.page import write_report

        if not self._rows:
            raise InputError("the study holds no row to report")
        check_possible(self._rows, self.path or "study")
        write_report(gather(self._rows, self._runs, title=title), Path(path), with_files=files)
        return Path(path)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        n_failed = sum(row.get("status") == "failed" for row in self._rows)
        splits = dict.fromkeys(row["split"] for row in self._rows)
        lines = [
            f"Study of {counted(len(self._rows), 'case')}: {counted(len(self._layers), 'layer')}, "
            f"{counted(len(splits), 'split')}" + (f", {n_failed} failed" if n_failed else "")
        ]
        if self.outcome is not None and self.outcome.interrupted:
            lines.append(f"interrupted: {counted(self.outcome.n_left, 'case')} left")
        try:
            lines.append(self._verdict.headline)
        except StoreError as error:
            lines.append(str(error))
        if self.path is not None:
            lines.append(f"in {self.path}")
        return "\n".join(lines)


class SweepSettings(TypedDict, total=False):
    """Keys of a sweep plan that `sweep` takes besides its own arguments; one value or several."""

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


def sweep(
    dump: str | Path,
    hw: str | Sequence[str],
    *,
    splits: Sequence[str] = (),
    tokens: int | None = None,
    jobs: int | None = None,
    out: str | Path | None = None,
    force: bool = False,
    on_event: "OnEvent | None" = None,
    **settings: Unpack[SweepSettings],
) -> Study:
    """Evaluate every layer of a dump in every split on every accelerator.

    Parameters
    ----------
    dump : str or Path
        Layer dump or checkpoint.
    hw : str or sequence of str
        Names of accelerators, or paths of their files.
    splits : sequence of str
        Precision splits; a default set by the width of the layers when empty.
    tokens : int, optional
        Activation rows to use; all by default.
    jobs : int, optional
        Worker processes, by default one per CPU; 0 for none, which Ctrl-C cannot stop inside a
        kernel. A script needs no ``__main__`` guard: workers do not run it again.
    out : str or Path, optional
        Folder of the results, as of ``loraq-sim sweep --out``: rows that it holds are not evaluated
        again. By default nothing is kept on disk.
    force : bool
        Evaluate again what `out` holds.
    on_event : callable, optional
        Called with a `SweepEvent` per step.
    **settings
        Further keys of a sweep plan, one value or several: those of `SweepSettings`.

    Returns
    -------
    Study
        Also after Ctrl-C, with the rows that were done; its outcome says how many are left.

    Raises
    ------
    InputError
        If a name, split or setting is unknown or breaks a rule.
    DumpError
        If the dump cannot be read, or none of its layers can.
    StoreError
        If the store cannot be written.
    """
    from loraq_sim.sweeps.plan import compose
    from loraq_sim.sweeps.plan_file import checked_values, plan_from_values

    asked: dict[str, Any] = {
        "dump": str(dump),
        "hw": _texts(hw),
        "splits": _texts(splits),
        "tokens": tokens,
    }
    asked |= {name: _plain(value) for name, value in settings.items()}
    asked = {name: value for name, value in asked.items() if value not in (None, ())}
    composed = compose(plan_from_values(checked_values(asked)))
    if out is not None:
        return _run(composed, Path(out), jobs=jobs, force=force, on_event=on_event, is_kept=True)
    with TemporaryDirectory(prefix="loraq-sim-") as folder:
        return _run(
            composed, Path(folder), jobs=jobs, force=force, on_event=on_event, is_kept=False
        )


def open_study(path: str | Path) -> Study:
    """The study of a result store, or of the folder that a sweep wrote.

    Raises
    ------
    StoreError
        If there is no store, or it cannot be read.
    """
    path = Path(path)
    with ResultStore.open(path / _STORE if path.is_dir() else path) as store:
        return Study(store.rows(), store.provenance(), path=store.path)


def _run(
    composed: "ComposedSweep",
    folder: Path,
    *,
    jobs: int | None,
    force: bool,
    on_event: "OnEvent | None",
    is_kept: bool,
) -> Study:
    from loraq_sim.sweeps.run import run_sweep

    with ResultStore.open(folder / _STORE, create=True) as store:
        outcome = run_sweep(composed, store, jobs=jobs, force=force, on_event=on_event)
        if outcome.is_unreadable:
            raise DumpError(f"no layer could be used: {outcome.first_failure}")
        study = Study.of_sweep(composed, store, outcome=outcome)
    if not is_kept:
        study.path = None
    return study


def _objectives(verdict: Verdict) -> list[str]:
    return verdict.objectives


def _texts(values: str | Path | Iterable[str | Path]) -> tuple[str, ...]:
    return (str(values),) if isinstance(values, str | Path) else tuple(map(str, values))


def _plain(value: Any) -> Any:
    """A sequence as a tuple; anything else as it is."""
    return tuple(value) if isinstance(value, list) else value
