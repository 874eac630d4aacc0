"""A sweep as an object: run it or open its store, then ask for rows, front, verdict and report.

    study = lq.sweep("pixart.pt", hw="aie2", splits=["W4A4", "W4A4+W8A8@fp16r32"])
    print(study.verdict())

The command line's ``sweep`` is the same run and builds the same object, so that rows and verdict
are the same.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Unpack, cast

from loraq_sim.errors import DumpError, InputError, unknown_name
from loraq_sim.results.cards import first_failure
from loraq_sim.results.columns import frame_of, number_names, parse_limits
from loraq_sim.results.front import best_under, least_possible, mark_front, per_layer_front
from loraq_sim.results.planned import partial_text
from loraq_sim.results.rows import IDENTITY, ResultRow, Row, ShownRow
from loraq_sim.results.store import ResultStore
from loraq_sim.results.store_records import check_possible
from loraq_sim.results.totals import MODEL_COLUMNS, ModelRow, model_totals, rows_of_total
from loraq_sim.results.verdict import Verdict, said_of_a_part, the_context, verdict_of
from loraq_sim.results.wording import cases_of, rows_in, the_case
from loraq_sim.sweeps.plan_file import SweepSettings
from loraq_sim.version import __version__

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    import hwmodels
    from loraq_sim.allocation import Allocation
    from loraq_sim.dumps import LayerDump
    from loraq_sim.explain import Explanation
    from loraq_sim.recipe import Recipe
    from loraq_sim.sweeps.plan import ComposedSweep
    from loraq_sim.sweeps.progress import OnEvent, SweepEvent
    from loraq_sim.sweeps.run import SweepOutcome

__all__ = ["Study", "open_study", "sweep"]

_STORE = "results.sqlite"
_NO_ROW = "the study holds no row; sweep into its store first: lq.sweep(..., out=...)"
_SHOWN_FIRST = ("weight_bytes", "energy_j", "sqnr_db", "bits_per_weight", "bound")
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

    A method that takes an `accelerator` needs it where there are several to choose from.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        runs: Sequence[dict[str, Any]] = (),
        *,
        path: Path | None = None,
        notes: Sequence[str] = (),
        outcome: "SweepOutcome | None" = None,
        footer: Mapping[str, Any] | None = None,
        missing: Sequence[Row] = (),
    ) -> None:
        self._rows = [ShownRow(row) for row in rows]
        self.path = path
        self.notes = tuple(notes)
        self.outcome = outcome
        self._runs = list(runs)
        self._footer = dict(footer or {})
        self._missing = list(missing)

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
        rows, whole = store.rows(composed.case_ids), composed.whole
        stored = store.stored_rows(whole.case_ids) if composed.others else rows
        known = {row["case_id"] for row in stored}
        left = [case.labels for case in whole.cases if case.case_id not in known]
        return cls(
            rows,
            store.provenance(),
            path=store.path,
            notes=composed.notes,
            outcome=outcome,
            missing=[{name: labels.get(name) for name in IDENTITY} for labels in left],
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
        """The rows as a DataFrame with a type a column: names as categories in the order of the
        sweep, counts as integers (``Int64`` where some are missing), numbers as floats, ``pareto``
        as bool. Units are in the names."""
        return frame_of(self._rows)

    @cached_property
    def totals(self) -> list[ModelRow]:
        """Totals of the model per split and accelerator, with ``pareto``; see `model_totals`."""
        marked = mark_front(self._sums, self._verdict.objectives, by=_PLACES["model"])
        return cast(list[ModelRow], [ShownRow(row) for row in marked])

    @property
    def missing(self) -> list[dict[str, Any]]:
        """Cases that were planned and have no row, by the columns that tell rows apart.

        Of stores of older releases only how many there are is known (`n_missing`).
        """
        return [dict(case) for case in self._missing if case]

    @property
    def n_missing(self) -> int:
        """How many cases were planned and have no row; one that failed has a row."""
        return len(self._missing)

    @property
    def partial(self) -> str:
        """What was planned and has no row yet, in words, as the verdict says it; empty if none."""
        return partial_text(len(self._rows), self._missing, is_kept=self.path is not None)

    def verdict(self) -> Verdict:
        """Which split to build, why, what ties with it and what would change it."""
        return self._verdict

    @cached_property
    def _sums(self) -> list[Row]:
        check_possible(self._rows, self.path or "study")
        return model_totals(self._rows, missing=self._missing)

    @cached_property
    def _verdict(self) -> Verdict:
        found = verdict_of(self._sums)
        return said_of_a_part(found, self._rows, self._missing, is_kept=self.path is not None)

    def front(self, by: str = "model") -> "pandas.DataFrame":
        """Rows that no other beats in error and cost, cheapest first, per accelerator.

        `by` is ``model`` for totals of the model, ``layer`` for each layer's rows.
        """
        if by not in _PLACES:
            raise InputError(unknown_name("front", by, _PLACES))
        frame = frame_of(self.totals, (*MODEL_COLUMNS, "pareto")) if by == "model" else self.df
        if frame.empty:
            return frame
        front = per_layer_front(frame, self._verdict.objectives, by=_PLACES[by])
        first = (*_PLACES[by][1:], "split", *self._verdict.objectives, *_SHOWN_FIRST)
        return front[list(dict.fromkeys(n for n in (*first, *front.columns) if n in front))]

    def best(
        self, *, minimize: str | None = None, accelerator: str | None = None, **limits: float | str
    ) -> ModelRow:
        """The model's total of least error within limits: the row that ``pareto --under`` names.

        Limits are the largest value of each column, ``latency_s=0.003, weight_bytes="400MB"``;
        `minimize` is another column to make small.

        Raises
        ------
        InputError
            If a column is unknown, or no split is within all limits: how little is possible.
        """
        if not limits:
            raise InputError("best needs a limit, such as latency_s=0.003 or weight_bytes='400MB'")
        self._judged(accelerator)
        totals = self._on(self.totals, accelerator)
        asked = parse_limits(limits, number_names(totals))
        found = best_under(totals, asked, minimize or self._verdict.error)
        if not found:
            raise InputError(least_possible(totals, asked))
        return cast(ModelRow, found[0])

    def plot_front(self) -> "Figure":
        """Error against cost of the whole model, the verdict as the title; a matplotlib figure."""
        from loraq_sim.reporting.figures import pareto_figure, shown_in_notebooks

        verdict = self._verdict
        if not verdict.cost:
            told = f"; {first_failure(self._rows)}".rstrip("; ")
            raise InputError(f"there is nothing to draw: no split has an error and a cost{told}")
        costs = [verdict.area or verdict.cost, verdict.cost if verdict.area else "weight_bytes"]
        dumps = dict.fromkeys(str(row.get("dump")) for row in self._rows)
        figure = pareto_figure(
            self.totals,
            x=list(dict.fromkeys(costs)) if len(verdict.on) == 1 else verdict.cost,
            y=verdict.error,
            model=", ".join(dumps),
            layers=len({row["layer"] for row in self._rows}),
            provenance=self._footer,
            verdict=verdict,
        )
        return shown_in_notebooks(figure)

    def plot_layers(
        self, quantity: str | None = None, *, accelerator: str | None = None
    ) -> "Figure":
        """A quantity of every layer (across) in every split (down), as the report page shows it.

        `quantity` is the error that the verdict is read from, or another that the page offers.
        """
        from loraq_sim.reporting.layer_figures import heat_map_figure

        context = self._judged(accelerator)
        figure = heat_map_figure(self._drawn, context, quantity or self._verdict.error)
        return self._shown(figure, context)

    def plot_arrays(self, *, accelerator: str | None = None) -> "Figure":
        """Of a sweep over MAC arrays: the gates of each by part, and its error against its area.

        It is of the verdict's split; such a sweep has several ``acc_bits``, say, in its `datapath`.
        """
        from loraq_sim.reporting.machine_figures import arrays_figure

        context = self._judged(accelerator)
        figure = arrays_figure(self._drawn, context)
        if figure is None:
            asked = "datapath={'acc_bits': (16, 24)}"
            raise InputError(f"the study is of one array; sweep over several, such as {asked}")
        return self._shown(figure, context)

    def plot_roofline(
        self, split: str | None = None, *, accelerator: str | None = None
    ) -> "Figure":
        """Every layer under the roofs of the machine, in a split or in that of the verdict."""
        from loraq_sim.reporting.machine_figures import roofline_figure

        context = self._judged(accelerator)
        label = split or self._verdict.on[context].label or ""
        rows = cases_of(self._on(self._rows, context), label, is_partial=bool(self._missing))
        return self._shown(roofline_figure(rows, self._machine(rows[0]["accelerator"])), context)

    def explain(
        self,
        layer: str,
        split: str | None = None,
        *,
        accelerator: str | None = None,
        dump: "str | Path | LayerDump | None" = None,
    ) -> "Explanation":
        """Where the error and the cost of one case of the study come from, as it was run.

        `layer` is a name, or a pattern that only one matches; `split` a split, its label where
        several cases have it, or that of the verdict; `dump` the file that the sweep read, if it is
        elsewhere by now.
        """
        from loraq_sim.explain.terms import dump_of_row, explain_row

        context = self._context(accelerator) if split else self._judged(accelerator)
        split = split or self._verdict.on[context].label or ""
        row = the_case(self._on(self._rows, context), layer, split, self.missing)
        found = dump_of_row(row, self._runs, dump)
        return explain_row(found[row["layer"]], row, self._machine(row["accelerator"]))

    def allocate(
        self,
        *,
        minimize: str | None = None,
        accelerator: str | None = None,
        method: str = "exact",
        **budget: float | str,
    ) -> "Allocation":
        """One split per layer within a budget such as ``latency_s=0.003``; `loraq_sim.allocate`."""
        from loraq_sim.allocation import allocate
        from loraq_sim.allocation.problem import AREAS, QUANTITIES

        check_possible(self._rows, self.path or "study")
        asked = parse_limits(budget, (*QUANTITIES, *AREAS))
        rows = self._on(self._rows, accelerator)
        return allocate(rows, asked, minimize=minimize, method=method)

    def recipe(
        self,
        path: str | Path | None = None,
        *,
        minimize: str | None = None,
        accelerator: str | None = None,
        **budget: float | str,
    ) -> "Recipe":
        """What ``loraq-sim solve --recipe`` takes: the verdict's split, or `allocate` in a budget.

        With a `path` it is written there as TOML; a file of that name is replaced.
        """
        from loraq_sim.allocation.frontier import allocation_recipe, recipe_of_rows
        from loraq_sim.recipe import write_recipe

        facts = {"loraq_sim": __version__} | ({"partial": self.partial} if self.partial else {})
        if budget:
            within: Any = budget
            found = self.allocate(minimize=minimize, accelerator=accelerator, **within)
            recipe = allocation_recipe(found, facts)
        else:
            chosen = dict(self._verdict.on[self._judged(accelerator)].row or {})
            facts |= {"model": chosen["dump"], "accelerator": chosen["accelerator"]}
            facts |= {"verdict": self._verdict.headline}
            recipe = recipe_of_rows(rows_of_total(self._rows, chosen), facts)
        if path is not None:
            write_recipe(path, recipe, overwrite=True)
        return recipe

    def report(self, path: str | Path, *, title: str | None = None, files: bool = False) -> Path:
        """Write the page of ``loraq-sim report`` to `path`, which is replaced, and return it.

        A ``.md`` gets verdict and numbers as Markdown. `title` is that of the dumps by default.
        With `files` pictures and tables are written beside a page, into ``NAME_files``.
        """
        from loraq_sim.reporting.gather import gather
        from loraq_sim.reporting.page import check_report_name, write_report

        check_report_name(path)
        if not self._rows:
            raise InputError(f"there is nothing to report: {_NO_ROW}")
        check_possible(self._rows, self.path or "study")
        data = gather(self._rows, self._runs, title=title, missing=self._missing)
        write_report(data, Path(path), with_files=files)
        return Path(path)

    @cached_property
    def _drawn(self) -> dict[str, Any]:
        from loraq_sim.reporting.gather import gather
        from loraq_sim.reporting.plot_data import plot_data
        from loraq_sim.reporting.report_data import answers

        check_possible(self._rows, self.path or "study")
        data = gather(self._rows, self._runs, missing=self._missing)
        return plot_data(data, answers(data), ())

    def _shown(self, figure: "Figure", context: str) -> "Figure":
        from loraq_sim.reporting.figures import shown_in_notebooks

        return shown_in_notebooks(figure, self._verdict.on[context].partial)

    def _context(self, accelerator: str | None) -> str:
        if not self._rows:
            raise InputError(_NO_ROW)
        return the_context(self._verdict, accelerator)

    def _judged(self, accelerator: str | None) -> str:
        """The context, in which some split has a result."""
        context = self._context(accelerator)
        verdict = self._verdict.on[context]
        if verdict.row is None:
            raise InputError("; ".join(filter(None, (verdict.headline, first_failure(self._rows)))))
        return context

    def _on(self, rows: Sequence[Any], accelerator: str | None) -> list[Any]:
        return rows_in(rows, self._context(accelerator))

    def _machine(self, name: str) -> "hwmodels.Accelerator":
        from loraq_sim.reporting.gather import machines_of

        found, notes = machines_of([name], self._runs)
        if name not in found:
            raise InputError("; ".join(notes))
        return found[name]

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        from loraq_sim.results.cards import study_lines

        return "\n".join(study_lines(self))

    def _repr_html_(self) -> str:
        from loraq_sim.results.cards import study_card

        return study_card(self)


def sweep(
    dump: str | Path,
    hw: str | Sequence[str],
    *,
    splits: Sequence[str] = (),
    tokens: int | None = None,
    jobs: int | None = None,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
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
    progress : bool, optional
        A bar with the time left and the front so far: by default in notebooks and on terminals.
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
    from loraq_sim.sweeps.plan_file import plan_of_call
    from loraq_sim.sweeps.progress import live_progress

    composed = compose(plan_of_call(dump, hw, splits=splits, tokens=tokens, **settings))
    with ExitStack() as stack:
        show = stack.enter_context(live_progress(progress))
        listeners = [show, *([on_event] if on_event else [])]
        folder = out or stack.enter_context(TemporaryDirectory(prefix="loraq-sim-"))
        study = _run(composed, Path(folder), jobs=jobs, force=force, listeners=listeners)
    if out is None:
        study.path = None
    return study


def open_study(path: str | Path) -> Study:
    """The study of a result store, or of the folder that a sweep wrote.

    Raises
    ------
    StoreError
        If there is no store, or it cannot be read.
    """
    path = Path(path)
    with ResultStore.open(path / _STORE if path.is_dir() else path) as store:
        rows, runs, missing = store.rows(), store.provenance(), store.missing()
        return Study(rows, runs, path=store.path, missing=missing)


def _run(
    composed: "ComposedSweep",
    folder: Path,
    *,
    jobs: int | None,
    force: bool,
    listeners: "Sequence[OnEvent]",
) -> Study:
    from loraq_sim.sweeps.run import run_sweep

    def tell(event: "SweepEvent") -> None:
        for listener in listeners:
            listener(event)

    with ResultStore.open(folder / _STORE, create=True) as store:
        outcome = run_sweep(composed, store, jobs=jobs, force=force, on_event=tell)
        if outcome.is_unreadable:
            raise DumpError(f"no layer could be used: {outcome.first_failure}")
        return Study.of_sweep(composed, store, outcome=outcome)
