"""Plans, shards, caches and forecasts of ``loraq-sim sweep``."""

import json
import threading
from pathlib import Path

import pytest

from loraq_sim.results.store import ResultStore
from loraq_sim.sweeps import SolutionCache

PLAN = ("sweep", "--plan", "examples/sweep_minilm.toml", "--jobs", 0, "--quiet")
SMALL = ("--set", "tokens=8", "--set", "layers=*layer.2*query,*layer.2*key", "--set", "hw=aie2")


def rows(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["rows"]


def test_the_plan_of_the_examples_runs_and_is_kept_with_the_results(command, tmp_path):
    words = (*PLAN, *SMALL, "--set", "override=[]", "--out", tmp_path / "a", "--format", "json")
    result = command(*words)
    found = rows(result)
    # Per layer: rounding, and two splits by two methods and two seeds; at two widths.
    assert len(found) == 2 * 2 * (1 + 2 * 2 * 2)
    plan = json.loads(result.stdout)["provenance"]["plan"]
    assert (plan["seed"], plan["tokens"], plan["datapath"]["acc_bits"]) == ([0, 1], 8, [16, 24])


def test_a_sweep_costs_in_the_kernels_asked_for(command, tmp_path):
    words = (*PLAN, "--layers", "*layer.2*query", "--tokens", 8, "--set", "override=[]")
    words = (*words, "--set", "splits=W8A8", "--set", "methods=rtn", "--format", "json")
    usual = rows(command(*words, "--hw", "aie2", "--out", tmp_path / "a"))
    other = rows(command(*words, "--hw", "aie2", "--kernel", "iron_gemm", "--out", tmp_path / "b"))
    assert {row["kernel"] for row in usual} == {"iron_whole_array"}
    assert {row["kernel"] for row in other} == {"iron_gemm"}
    assert {row["options"] for row in other} == {'{"kernel": "iron_gemm"}'}
    assert other[0]["latency_s"] != usual[0]["latency_s"]
    lacking = command(*words, "--hw", "aie2", "--kernel", "cublas", "--out", tmp_path / "c")
    assert lacking.exit_code != 0
    assert "aie2 has no kernel family 'cublas'" in " ".join(lacking.output.split())


def test_flags_go_before_the_file_and_defaults_do_not(command, tmp_path):
    words = (*PLAN, "--layers", "*layer.2*query", "--tokens", 8, "--hw", "aie2", "--seed", 5)
    words = (*words, "--acc-bits", 20, "--override", "self_q:method=lqer", "--format", "json")
    result = command(*words, "--out", tmp_path / "a")
    assert {row["acc_bits"] for row in rows(result)} == {20}
    assert {row["method"] for row in rows(result)} == {"rtn", "lqer"}
    plan = json.loads(result.stdout)["provenance"]["plan"]
    assert (plan["seed"], plan["preset"]) == (5, "fast")


def test_totals_of_a_plan_with_overrides_cover_every_layer(command, tmp_path):
    words = (*PLAN, "--set", "tokens=8", "--set", "hw=aie2", "--set", "layers=ffn_up,self_q")
    words = (*words, "--set", "seeds=0", "--set", "datapath.acc_bits=24", "--set", "methods=lqer")
    report = json.loads(command(*words, "--out", tmp_path / "a", "--format", "json").stdout)
    totals = {row["split"]: row for row in report["model"]}
    assert set(totals) == {"W4A4", "W4A4+W16A16r8", "W4A4+W8A8@fp16r8"}
    assert {row["n_layers"] for row in totals.values()} == {3}
    assert {row["complete"] for row in totals.values()} == {True}
    done = {row["split"] for row in report["rows"] if row["kind"] == "ffn_up"}
    assert done == {"W4A4", "W4A4+W16A16@fp16r12", "W4A4+W8A8@fp16r12"}


def test_parts_of_a_sweep_merge_to_the_whole(sweep, command, tmp_path):
    whole = rows(sweep(tmp_path / "whole", "--format", "json"))
    for part in (1, 2):
        assert sweep(tmp_path / f"p{part}", "--shard", f"{part}/2").exit_code == 0
    done = command("merge", tmp_path / "m", tmp_path / "p2", tmp_path / "p1")
    assert done.exit_code == 0, done.output
    again = rows(sweep(tmp_path / "m", "--format", "json"))
    assert [row | {"seconds": 0} for row in again] == [row | {"seconds": 0} for row in whole]


def test_a_store_that_is_being_written_is_not_replaced(sweep, command, tmp_path):
    sweep(tmp_path / "a")
    sweep(tmp_path / "m", "--seed", 1)
    # A sweep in its midst: one row more comes after the merge was asked for.
    with ResultStore.open(tmp_path / "m" / "results.sqlite", create=True) as store:
        before = store.rows()
        refused = command("merge", tmp_path / "m", tmp_path / "a", "--force")
        assert (refused.exit_code, "is being written by" in refused.stderr) == (2, True)
        late = {k: v for k, v in before[0].items() if k != "case_id"} | {"layer": "late"}
        store.add("late", late)
    with ResultStore.open(tmp_path / "m" / "results.sqlite") as store:
        assert len(store.rows()) == len(before) + 1
    assert command("merge", tmp_path / "m", tmp_path / "a", "--force").exit_code == 0


def test_merge_replaces_nothing_unasked_and_never_its_own_source(sweep, command, tmp_path):
    sweep(tmp_path / "a")
    assert command("merge", tmp_path / "m", tmp_path / "a").exit_code == 0
    refused = command("merge", tmp_path / "m", tmp_path / "a")
    assert (refused.exit_code, "--force" in refused.stderr) == (2, True)
    assert command("merge", tmp_path / "m", tmp_path / "a", "--force").exit_code == 0
    refused = command("merge", tmp_path / "a", tmp_path / "a", "--force")
    assert (refused.exit_code, "one of the stores" in refused.stderr) == (2, True)
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        *("results.csv", "results.sqlite"),
    ]


def test_solutions_are_kept_where_asked_and_used_by_another_store(sweep, tmp_path, monkeypatch):
    folder = tmp_path / "solutions"
    # However quickly they were solved.
    monkeypatch.setitem(SolutionCache.__init__.__kwdefaults__, "least_seconds", 0.0)
    wide = ("--solution-cache", folder)
    first = rows(sweep(tmp_path / "a", *wide, "--format", "json"))
    kept = sorted(folder.rglob("*.safetensors"))
    assert kept
    second = rows(sweep(tmp_path / "b", *wide, "--acc-bits", 20, "--format", "json"))
    assert sorted(folder.rglob("*.safetensors")) == kept
    assert [r["weight_error"] for r in first] == [r["weight_error"] for r in second]


def test_without_a_cache_nothing_is_kept(sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("LORAQ_SIM_CACHE", str(tmp_path / "cache"))
    assert sweep(tmp_path / "a", "--no-solution-cache").exit_code == 0
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_dry_run_tells_memory_and_part(sweep, tmp_path):
    words = ("--dry-run", "--shard", "1/2", "--format", "json")
    found = json.loads(sweep(tmp_path / "a", *words).stdout)
    assert (found["shard"], found["layers"], found["cases"]) == ("1/2", 1, 3)
    assert 150 < found["peak_memory_per_worker_mib"] < 400


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--plan", "none.toml"), "cannot read plan none.toml: No such file"),
        (("--set", "tokns=3"), "did you mean 'tokens'"),
        (("--shard", "3/2"), "i/n with i from 1 to n"),
        (("--shard", "1/9"), "only 2 layers"),
        (("--override", "to_x:rank=2"), "matches none of 2 layers"),
        (("--override", "rank=2"), "must look like"),
        (("--solution-cache", "/proc/nowhere/x"), "/proc/nowhere"),
    ],
)
def test_bad_requests_are_one_line(sweep, tmp_path, words, message):
    result = sweep(tmp_path / "a", *words)
    assert (result.exit_code, result.stderr.count("\n"), result.stdout) == (2, 1, "")
    assert message in result.stderr


def test_a_sweep_without_dump_or_accelerator_says_what_to_give(command):
    missing = command("sweep", "--hw", "aie2")
    assert (missing.exit_code, "give --layer-dump" in missing.stderr) == (2, True)
    missing = command("sweep", "--layer-dump", "examples/minilm.pt")
    assert (missing.exit_code, "give --hw" in missing.stderr) == (2, True)


def test_the_example_plan_is_in_the_readme(request):
    root = Path(request.config.rootpath)
    assert "--plan examples/sweep_minilm.toml" in (root / "README.md").read_text()


def test_a_dry_run_on_slurm_shows_the_job_script(command, tmp_path):
    words = ("--scheduler", "slurm", "--scheduler-option", "cores=8", "--dry-run")
    words += ("--set", "override=[]")
    result = command(*PLAN, *SMALL, *words, "--scheduler-option", "queue=cpu")
    assert result.exit_code == 0, result.output
    assert "\njobs" in result.stdout
    assert "#SBATCH -p cpu\n#SBATCH -n 1\n#SBATCH --cpus-per-task=8\n" in result.stdout


def test_options_without_their_scheduler_are_refused(command):
    result = command(*PLAN, *SMALL, "--scheduler-option", "cores=8")
    assert (result.exit_code, result.stderr) == (
        2,
        "error: --scheduler-option needs --scheduler slurm\n",
    )
    result = command(*PLAN, "--scheduler", "slurm", "--scheduler-option", "cores")
    assert "--scheduler-option must look like KEY=VALUE, got 'cores'" in result.stderr


def test_a_second_sweep_waits_for_the_first_or_is_told_so(sweep, command, tmp_path):
    words = ("--layers", "*.0.attn1.to_q", "--split", "W4A4", "--format", "json")
    with ResultStore.open(tmp_path / "results.sqlite", create=True) as store:
        result = sweep(tmp_path, *words, "--no-wait")
        assert result.exit_code == 2
        assert "is being written by process" in result.stderr
        closing = threading.Timer(1.0, store._lock.release)
        closing.start()
        waited = command(
            *("sweep", "--hw", "aie2", "--layer-dump", "examples/tiny_pixart.pt", *words),
            *("--tokens", 8, "--jobs", 0, "--out", tmp_path),
        )
        closing.join()
    assert waited.exit_code == 0, waited.output
    assert "waiting until it has finished (--no-wait gives up)" in waited.stderr
