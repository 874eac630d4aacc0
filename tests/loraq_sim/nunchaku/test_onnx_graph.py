"""Solved layers as an ONNX graph, run by onnxruntime and compared with the emulated data path."""

import numpy as np
import pytest

import loraq_sim as lq
from loraq_sim.errors import InputError
from loraq_sim.evaluate import solve_case
from loraq_sim.nunchaku import write_onnx_model
from loraq_sim.quantized_model import write_quantized_model
from loraq_sim.settings import CaseSettings

CASES = {
    "W4A4": {},
    "W8A8": {},
    "W4A4+W8A8r8": {},
    "W4A16+W8A8@fp16r4": {},
    "W4A4+W16A16r8": {"smooth": 0.5},
    "W8A8+W4A4r8": {"rotate": "hadamard:32"},
    "W4A4~W8A8r8f3": {},
    "W4A8+W6A6r5": {"group": 32},
    "W4A4[int4/row]": {},
}


def layer(n=40, k=160):
    rng = np.random.default_rng(0)
    loud = np.exp(rng.standard_normal(k)).astype(np.float32)
    return lq.Layer(
        name="blocks.0.fc",
        weight=rng.standard_normal((n, k)).astype(np.float32),
        activations=rng.standard_normal((12, k)).astype(np.float32) * loud,
        bias=rng.standard_normal(n).astype(np.float32),
    )


@pytest.mark.parametrize("text", CASES)
def test_onnxruntime_gives_what_the_emulator_does(text, tmp_path):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    fc = layer()
    settings = CaseSettings.of(text, preset="fast", **CASES[text])
    solution = solve_case(fc, settings)
    path = lq.Datapath(out_format="fp32")
    expected = lq.run_layer(fc.activations, solution, settings.split, path, bias=fc.bias).y
    file = write_onnx_model(
        *(tmp_path / "model.onnx", {fc.name: solution}, settings.split),
        biases={fc.name: fc.bias},
        datapath=path,
    )
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (found,) = session.run([f"{fc.name}.y"], {f"{fc.name}.x": fc.activations})
    # The same codes in the same blocks; float32 sums of 160 products in another order. A single
    # code off by one would be 1e-3.
    assert np.linalg.norm(found - expected) < 2e-6 * np.linalg.norm(expected)
    # Another number of rows runs, too.
    (first,) = session.run([f"{fc.name}.y"], {f"{fc.name}.x": fc.activations[:1]})
    np.testing.assert_allclose(first[0], found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("W4A4u", "are not written as ONNX; use intN"),
        ("W4A4s", "by the rule signed_absmax"),
        ("W4A4g", "shifted inputs behind GELU"),
    ],
)
def test_what_has_no_operators_is_refused(text, message, tmp_path):
    pytest.importorskip("onnx")
    solution = solve_case(layer(), CaseSettings.of("W4A4", preset="fast"))
    with pytest.raises(InputError, match=message):
        write_onnx_model(tmp_path / "model.onnx", {"fc": solution}, text)
    assert not (tmp_path / "model.onnx").exists()


def test_weights_without_blocks_are_refused(tmp_path):
    pytest.importorskip("onnx")
    solution = lq.solve(layer().weight, main="mxfp4", method="rtn")
    with pytest.raises(InputError, match="has no DequantizeLinear in blocks"):
        write_onnx_model(tmp_path / "model.onnx", {"fc": solution}, "W4A16")


def test_the_command_writes_the_data_path_of_a_machine(tmp_path):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    from typer.testing import CliRunner

    from loraq_sim.cli.app import app
    from loraq_sim.dumps import write_layer_dump

    fc = layer(n=24, k=64)
    write_layer_dump(tmp_path / "dump.safetensors", [fc])
    solution = solve_case(fc, CaseSettings.of("W4A4+W8A8r4", preset="fast"))
    write_quantized_model(tmp_path / "q.safetensors", {fc.name: solution})
    words = ["model", "convert", tmp_path / "q.safetensors", tmp_path / "q.onnx", "--to", "onnx"]
    words += [
        "--split",
        "W4A4+W8A8r4",
        "--hw",
        "aie2",
        "--layer-dump",
        tmp_path / "dump.safetensors",
    ]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    session = runtime.InferenceSession(str(tmp_path / "q.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {f"{fc.name}.x": fc.activations})
    row = lq.evaluate_layer(fc, "W4A4+W8A8r4", "aie2", preset="fast")
    exact = fc.activations @ fc.weight.T + fc.bias
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    # y is written in the machine's 16 bits: a rounding of 2^-9 at most, half of which may flip.
    assert error == pytest.approx(row["output_error"], rel=1e-3)


def test_split_and_layout_go_together(tmp_path):
    from typer.testing import CliRunner

    from loraq_sim.cli.app import app

    for words in (["--to", "onnx"], ["--to", "nunchaku", "--split", "W4A4"]):
        result = CliRunner().invoke(app, ["model", "convert", "a", "b", *words])
        assert result.exit_code == 2
        assert "give --split with --to onnx" in result.stderr
