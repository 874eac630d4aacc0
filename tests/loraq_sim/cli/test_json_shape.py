"""One JSON shape: every command prints an object whose ``rows`` are those of ``--format csv``."""

import csv
import io
import json
import sqlite3

import numpy as np
import pytest
import typer
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

import loraq_sim as lq
from loraq_sim.cli.app import app
from loraq_sim.cli.output import SCHEMA_VERSION
from loraq_sim.cli.schema import json_schema, schema_names
from loraq_sim.quantized_model import write_quantized_model

DUMP = "examples/tiny_pixart.pt"
LAYER = "transformer_blocks.0.attn1.to_q"
Q = ("--layer-dump", DUMP, "--layers", LAYER)
GEMM = ("--shape", "64x128x128", "--split", "W4A8")
# Words of a run of each command that has --format; {} is a folder with stores and a model.
RUNS = {
    "allocate": ("{}/demo", "--budget", "weight_bytes=1GB"),
    "compare": ("{}/demo", "{}/other"),
    "cost": ("--hw", "aie2,a100", *GEMM),
    "doctor": (),
    "dump capture": ("examples/capture_entry.py:two_layers", "--out", "{}/c.npz", "--force"),
    "dump convert": (DUMP, "{}/d.npz", "--force"),
    "dump info": (DUMP,),
    "dump synth": ("--model", "sana-0.6b", "--layers", "*.0.attn1.*", "--tokens", 8, "--out",
                   "{}/s.npz", "--force"),
    "emulate": ("--hw", "aie2", *Q, "--split", "W8A8", "--tokens", 16),
    "explain": ("--hw", "aie2", "--layer-dump", DUMP, "--layer", LAYER, "--split", "W4A4,W8A8",
                "--tokens", 16, "--preset", "fast"),
    "explore": ("--published",),
    "hw energy": (*Q, "--split", "W4A4,W8A8", "--cycles", 256),
    "hw explain": ("aie2", *GEMM),
    "hw fit": ("{}/measured.csv", "--hw", "t4", "--kernel", "cublas"),
    "hw list": (),
    "hw new": ("{}/chip.yaml", "--split", "W8A8", "--clock", "1.2GHz", "--force"),
    "hw show": ("aie2",),
    "hw synth": ("--acc-bits", "16,21", "--node", 7),
    "hw validate": (),
    "images": ("--hw", "aie2", "--images", 1, "--steps", 1, "--checkpoint", "examples/tiny_pixart",
               "--split", "W8A8", "--out", "{}/images", "--force"),
    "model convert": ("{}/q.safetensors", "{}/n.safetensors", "--to", "nunchaku", "--force"),
    "model info": ("{}/q.safetensors",),
    "pareto": ("{}/demo",),
    "solve": (*Q, "--split", "W4A4+W8A8r8", "--preset", "fast"),
    "steps": ("--hw", "aie2", *Q, "--split", "W8A8", "--preset", "fast", "--tokens", 50),
    "sweep": ("--hw", "aie2", *Q, "--split", "W4A4,W8A8", "--preset", "fast", "--tokens", 16,
              "--jobs", 0, "--out", "{}/again", "--no-solution-cache"),
    "vectors": ("--hw", "aie2", "--layer-dump", DUMP, "--layer", LAYER, "--split", "W8A8",
                "--tokens", 4, "--out", "{}/v", "--force"),
}  # fmt: skip
# Other modes of commands, whose JSON has other fields, and cases that fail.
MODES = [
    ("cost", "--model", "pixart-sigma", "--hw", "aie2", "--split", "W4A4+W8A8r64"),
    ("cost", "--hw", "aie2", *GEMM, "--vary", "clock_hz=1e9,2e9", "--vary", "mac_array.columns=4"),
    ("cost", "--hw", "aie2", "--shape", "64x128x128", "--split", "W4A8,W4A4+W8A8r200"),
    ("cost", "--hw", "aie2,{}/chip.yaml", *GEMM),
    ("explain", "hypervolume"),
    ("dump info", DUMP, "--layers", LAYER, "--steps"),
    ("dump info", DUMP, "--layers", LAYER, "--no-statistics"),
    ("pareto", "{}/demo", "--by", "layer"),
    ("pareto", "{}/demo", "--under", "output_error=50%", "--minimize", "output_error,weight_bytes"),
    ("allocate", "{}/demo", "--budget", "output_error=50%", "--minimize", "energy_j"),
    ("solve", *Q, "--split", "W4A4+W8A8r4", "--compare", "rtn,svdquant", "--preset", "fast"),
    ("sweep", "--hw", "aie2", *Q, "--split", "W8A8", "--dry-run", "--out", "{}/dry"),
    ("emulate", "--hw", "aie2", *Q, "--split", "W8A8,W4A4+W8A8r999", "--tokens", 4),
    ("hw new", "chip", "--rows", 2, "--out", "{}", "--force"),
    ("hw new", "edge", "--from-yaml", "examples/edge_npu.zigzag.yaml", "--out", "{}", "--force"),
    ("hw validate", "--hw", "t4", "--cross"),
    ("compare", "{}/demo", "{}/demo"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    path = tmp_path_factory.mktemp("shape")
    words = ("--hw", "aie2", "--layer-dump", request.config.rootpath / DUMP, "--layers", LAYER)
    for name, splits in (("demo", "W4A4,W8A8"), ("other", "W8A8")):
        more = ("--split", splits, "--preset", "fast", "--tokens", 16, "--jobs", 0, "--quiet")
        done = invoke("sweep", *words, *more, "--out", path / name)
        assert done.exit_code == 0, done.output
    weight = np.random.default_rng(0).standard_normal((128, 128)).astype(np.float32)
    solution = lq.solve(weight, main="int4/g64", branch="fp16", rank=4, preset="fast")
    write_quantized_model(path / "q.safetensors", {"block.fc": solution})
    header, *rows = (request.config.rootpath / "hwmodels/measured_gemm.csv").read_text().split("\n")
    rows = [row for row in rows if row.startswith("t4,cublas,")]
    (path / "measured.csv").write_text("\n".join([header, *rows[:4]]))
    return path


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def with_format(group, prefix=""):
    for name, found in group.commands.items():
        if hasattr(found, "commands"):
            yield from with_format(found, f"{prefix}{name} ")
        elif any("--format" in parameter.opts for parameter in found.params):
            yield f"{prefix}{name}"


def wrong_in(name, shown):
    """What of an output is not as `loraq-sim schema NAME` says, in the mode it fits best."""
    schema = json_schema(name)
    modes = [Draft202012Validator(one) for one in schema.get("anyOf", [schema])]
    found = [[f"{e.json_path}: {e.message}" for e in mode.iter_errors(shown)] for mode in modes]
    return min(found, key=len)


def test_every_command_is_tried():
    assert set(RUNS) == set(with_format(typer.main.get_command(app)))
    assert set(schema_names()) == {*RUNS, "store"}


@pytest.mark.parametrize("words", MODES, ids=lambda words: " ".join(map(str, words))[:60])
def test_other_modes_print_what_their_schema_says(words, folder, request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    if words[0] == "cost" and "chip" in words[2]:
        invoke("hw", "new", "chip", "--rows", 2, "--out", folder, "--force")
    name, *words = (str(word).replace("{}", str(folder)) for word in words)
    done = invoke(*name.split(), *words, "--format", "json")
    assert done.exit_code in (0, 1), done.output
    assert wrong_in(name, json.loads(done.stdout)) == []


def test_schema_command_prints_one_schema_or_all():
    whole = json.loads(invoke("schema").stdout)
    Draft202012Validator.check_schema(whole)
    assert {name.replace(" ", "_") for name in schema_names()} == set(whole["$defs"])
    one = json.loads(invoke("schema", "hw", "list").stdout)
    assert one["properties"]["schema"]["properties"]["name"] == {"const": "hw list"}
    shown = json.loads(invoke("hw", "list", "--format", "json").stdout)
    Draft202012Validator(whole).validate(shown)
    Draft202012Validator(one).validate(shown)
    done = invoke("schema", "swep")
    assert done.exit_code == 2
    assert "did you mean 'sweep'" in done.stderr


def test_a_field_more_or_less_is_noticed():
    shown = json.loads(invoke("hw", "list", "--format", "json").stdout)
    shown["rows"][0]["surprise"] = 1
    assert "surprise" in wrong_in("hw list", shown)[0]
    del shown["rows"][0]["surprise"], shown["rows"][0]["aliases"]
    assert "'aliases' is a required property" in wrong_in("hw list", shown)[0]
    shown["rows"][0]["aliases"] = 5
    assert "5 is not of type 'string'" in wrong_in("hw list", shown)[0]


def test_every_field_has_a_meaning_and_every_number_in_a_unit_says_it():
    def fields(schema):
        for name, field in schema.get("properties", {}).items():
            yield name, field
            yield from fields(field)
            yield from fields(field.get("items", {}))

    for name in schema_names():
        schema = json_schema(name)
        for mode in schema.get("anyOf", [schema]):
            for field, said in fields(mode):
                if field not in ("schema", "rows", "name", "version", "params"):
                    assert said.get("description"), (name, field)
                if field.endswith(("_s", "_bytes", "_j", "_pj", "_ge", "_mm2", "_nm", "_ms")):
                    assert said.get("unit"), (name, field)


def test_rows_of_a_store_are_as_their_schema_says(folder):
    with sqlite3.connect(folder / "demo" / "results.sqlite") as store:
        store.row_factory = sqlite3.Row
        rows = [dict(row) for row in store.execute("SELECT * FROM rows")]
    store.close()
    validator = Draft202012Validator(json_schema("store"))
    assert len(rows) == 2
    for row in rows:
        assert set(row) == set(json_schema("store")["properties"])
        validator.validate(row)


@pytest.mark.parametrize("name", sorted(RUNS))
def test_json_is_an_object_with_the_rows_of_csv(name, folder, request, monkeypatch):
    if name == "images":
        pytest.importorskip("diffusers", reason="needs the extra [diffusion]")
    monkeypatch.chdir(request.config.rootpath)
    words = [*name.split(), *(str(word).replace("{}", str(folder)) for word in RUNS[name])]
    found, table = (invoke(*words, "--format", form) for form in ("json", "csv"))
    assert (found.exit_code, table.exit_code) == (0, 0), found.output + table.output
    shown = json.loads(found.stdout)
    assert shown["schema"] == {"name": name, "version": SCHEMA_VERSION}
    assert wrong_in(name, shown) == []
    lines = list(csv.DictReader(io.StringIO(table.stdout)))
    assert len(shown["rows"]) == len(lines) or name == "compare"
    assert all(set(row) <= set(lines[0]) for row in shown["rows"])
    # Numbers are the same in both, where they are no times.
    for row, line in zip(shown["rows"], lines, strict=name != "compare"):
        for key, value in row.items():
            if isinstance(value, int) and not isinstance(value, bool):
                assert float(line[key]) == value, key


def test_notes_of_a_forecast_are_on_stderr(request, monkeypatch, tmp_path):
    """A program reads stdout: in every format it holds the forecast alone."""
    monkeypatch.chdir(request.config.rootpath)
    words = ("sweep", "--hw", "aie2", *Q, "--preset", "fast", "--dry-run", "--out", tmp_path / "a")
    shown = json.loads(invoke(*words, "--format", "json").stdout)
    assert shown["notes"]
    for form in ("table", "csv", "md"):
        done = invoke(*words, "--format", form)
        assert done.exit_code == 0, done.output
        for remark in shown["notes"]:
            assert remark in done.stderr
            assert remark not in done.stdout
    assert invoke(*words, "--quiet").stderr == ""
