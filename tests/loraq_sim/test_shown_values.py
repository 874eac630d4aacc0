"""Every public name, and what it returns, shows itself in at most 12 lines that say something."""

import re
import traceback

import numpy as np
import pytest

import hwmodels
import loraq_sim as lq
from loraq_sim.machine import datapath_for

MOST_LINES, MOST_CHARACTERS = 12, 1600
ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}>")
LAYER = "transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def at_hand(request):
    """What the examples below are made of."""
    root = request.config.rootpath
    dump = lq.read_layer_dump(root / "examples" / "tiny_pixart.pt")
    layer = dump[LAYER]
    machine = hwmodels.load_accelerator("aie2")
    split = lq.parse_split("W4A4+W8A8r8")
    solution = lq.solve(layer.weight, rank=8, preset="fast")
    study = lq.sweep(
        root / "examples" / "tiny_pixart.pt", "aie2", splits=["W4A4", "W8A8"], layers="*.0.attn1.*",
        tokens=8, presets="fast", jobs=0,
    )  # fmt: skip
    work = hwmodels.GemmWorkload(m=4096, n=4608, k=1152, branch="W8A8", rank=64)
    return {
        **{"dump": dump, "layer": layer, "machine": machine, "split": split, "work": work},
        **{"solution": solution, "study": study, "mac": lq.MacArray(acc_bits=20)},
        **{"a": np.ones((300, 64), np.int8), "w": np.ones((500, 64), np.int8)},
    }


def model_of(at):
    import torch

    return torch.nn.Sequential(torch.nn.Linear(64, 64))


# What each public name returns (functions) or is made into (classes), and a part of what it shows.
SHOWN = {
    "Datapath": (lambda at: datapath_for(at["machine"]), "acc_bits=32"),
    "Format": (lambda at: lq.parse_format("int4/g64"), "Format('int4/g64/fp16')"),
    "InputError": (lambda at: lq.InputError("why"), "InputError('why')"),
    "Layer": (lambda at: at["layer"], f"Layer('{LAYER}', kind='self_q', n=128, k=128"),
    "LoraqError": (lambda at: lq.LoraqError("why"), "LoraqError('why')"),
    "MacArray": (lambda at: at["mac"], "MacArray(acc_bits=20"),
    "PrecisionSplit": (lambda at: at["split"], "PrecisionSplit('W4A4+W8A8r8', family='int'"),
    "QuantizedTensor": (lambda at: at["solution"].main, "'int4/g64/fp16', 128 x 128, 8,704 bytes"),
    "ResultStore": (lambda at: at["store"], "results.sqlite', writing)"),
    "Solution": (lambda at: at["solution"], "Solution of a 128 x 128 weight by loraq fast, seed 0"),
    "Study": (lambda at: at["study"], "Study of 8 cases: 4 layers, 2 splits\nBuild "),
    "__version__": (lambda at: lq.__version__, "."),
    "allocate": (
        lambda at: at["study"].allocate(weight_bytes=1e9),
        "Allocation of 4 layers on aie2: 4 in W8A8\nleast output_error with weight_bytes <= 1e+09",
    ),
    "emulate_gemm": (lambda at: lq.emulate_gemm(at["a"], at["w"], at["mac"]), "[64, 64, 64"),
    "emulate_gemm_report": (
        lambda at: lq.emulate_gemm_report(at["a"], at["w"], at["mac"]),
        "GemmReport of 300 x 500 sums: overflow_count=0",
    ),
    "emulate_gemm_requantize": (lambda at: lq.emulate_gemm_requantize, "emulate_gemm_requantize"),
    "emulate_model": (
        lambda at: lq.emulate_model(model_of(at), "W8A8", "aie2"),
        "EmulatedModel(Sequential, 1 layers)",
    ),
    "evaluate_layer": (
        lambda at: lq.evaluate_layer(at["layer"], "W8A8", "aie2", tokens=8),
        f"layer='{LAYER}', kind='self_q', m=512, n=128, k=128\nsplit='W8A8', method='rtn'",
    ),
    "explain_case": (
        lambda at: lq.explain_case(at["layer"], "W8A8", "aie2", tokens=8),
        f"{LAYER} in W8A8 on aie2: output error 0.",
    ),
    "open_study": (lambda at: at["study"], "Build W8A8 on aie2"),
    "pareto_front": (lambda at: lq.pareto_front(at["study"].front()), "output_error"),
    "parse_format": (lambda at: lq.parse_format("mxfp4"), "Format('mxfp4')"),
    "parse_split": (lambda at: lq.parse_split("W4A8", family="mxint"), "family='mxint'"),
    "quantize": (lambda at: lq.quantize(at["layer"].weight, "bf16"), "('bf16', 128 x 128, 32,768"),
    "read_layer_dump": (lambda at: at["dump"], "tiny_pixart.pt', 20 layers)"),
    "read_quantized_model": (lambda at: lq.read_quantized_model(at["saved"]), "q.safetensors', 1"),
    "run_layer": (
        lambda at: lq.run_layer(
            at["layer"].activations[:8], at["solution"], at["split"], datapath_for(at["machine"])
        ),
        "LayerOutput 8 x 128 of main, down, up: overflow_count=0",
    ),
    "runtime_requantizer": (lambda at: lq.runtime_requantizer, "runtime_requantizer"),
    "solve": (
        lambda at: lq.solve(at["layer"].weight, method="rtn"),
        "by rtn balanced, seed 0\nweight error 12.",
    ),
    "srs": (lambda at: lq.srs(np.full((90, 90), 77, np.int32), 2), "19"),
    "sweep": (lambda at: at["study"], "8 cases"),
    "verdict_of": (lambda at: at["study"].verdict(), "Build W8A8 on aie2\nW8A8 has 0."),
    "write_layer_dump": (lambda at: lq.write_layer_dump, "write_layer_dump"),
    "write_quantized_model": (lambda at: at["saved"], "q.safetensors"),
}
HARDWARE = {
    "load_accelerator": (lambda at: at["machine"], "Accelerator('aie2': AMD XDNA1 NPU"),
    "GemmWorkload": (lambda at: at["work"], "(m=4096, n=4608, k=1152, branch='W8A8', rank=64)"),
    "estimate_cost": (lambda at: hwmodels.estimate_cost(at["work"], at["machine"]), "bound='dram'"),
    "synthesized_array": (
        lambda at: hwmodels.synthesized_array(at["mac"], a_bits=8, w_bits=4, node_nm=7),
        "SynthesizedArray(8 x 4 bits, acc_bits=20, products_per_add=1, modeled, node_nm=7",
    ),
    "load_node": (lambda at: hwmodels.load_node(7), "ProcessNode(7 nm, nand2_um2="),
    "load_model": (lambda at: hwmodels.load_model("pixart-sigma", 512), "512 pixels: "),
    "kernels": (
        lambda at: hwmodels.estimate_cost(at["work"], at["machine"]).kernels[0],
        "KernelCost(role='main', latency_s=",
    ),
    "sketch": (lambda at: hwmodels.sketch("mine"), "Accelerator('mine'"),
    "totals": (lambda at: at["study"].totals[0], "split='W4A4', method='rtn'"),
    "rows": (lambda at: at["study"].rows[0], "layer='transformer_blocks.0."),
    "outcome": (lambda at: at["study"].outcome, "n_ok=8"),
    "problem": (lambda at: at["study"].allocate(weight_bytes=1e9).problem, "4 layers, 8 options"),
    "recipe": (lambda at: at["study"].recipe(), "Recipe of 4 entries: 4 in W8A8"),
    "front": (lambda at: at["study"].front(), "accelerator"),
    "info": (lambda at: at["dump"].info(LAYER), "kind='self_q'"),
}


def test_every_public_name_has_an_example():
    assert set(SHOWN) == set(lq.__all__)


@pytest.mark.parametrize(("name", "example"), [*SHOWN.items(), *HARDWARE.items()])
def test_a_value_shows_itself_in_a_few_lines(name, example, at_hand, tmp_path):
    make, told = example
    at = at_hand | {"saved": tmp_path / "q.safetensors"}
    if "write" in name or "read_q" in name:
        lq.write_quantized_model(at["saved"], {"a": at["solution"]})
    with lq.ResultStore.open(tmp_path / "results.sqlite", create=True) as store:
        value = make(at | {"store": store})
        shown = repr(value)
    assert told in shown
    assert len(shown.splitlines()) <= MOST_LINES
    assert len(shown) <= MOST_CHARACTERS
    # A function may show where it lives; a value says what it is.
    assert callable(value) or not ADDRESS.search(shown)


def raised_in_a_cell(source, error):
    """What IPython asks an error for, raised by a cell of this source."""
    code = compile(source, "/anywhere/ipykernel_123/456789.py", "exec")
    try:
        exec(code, {"lq": lq, "hwmodels": hwmodels})
    except error as caught:
        return caught._render_traceback_()
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("source", "error", "told"),
    [
        ("lq.parse_split('W4B4')", lq.InputError, "InputError: "),
        ("lq.read_layer_dump('missing.pt')", lq.LoraqError, "missing.pt"),
        ("hwmodels.load_accelerator('aie9')", hwmodels.AcceleratorError, "AcceleratorError: "),
        ("lq.open_study('nowhere')", lq.LoraqError, "StoreError: "),
        ("lq.sweep('examples/tiny_pixart.pt', 'aie2', split=['W4A4'])", lq.InputError, "'split'"),
    ],
)
def test_a_notebook_shows_an_error_in_a_line_and_not_our_frames(source, error, told):
    lines = raised_in_a_cell(source, error)
    assert told in lines[0]
    assert len("\n".join(lines).splitlines()) <= 2


def test_a_bug_report_gets_the_frames(monkeypatch):
    monkeypatch.setenv("LORAQ_SIM_DEBUG", "1")
    lines = raised_in_a_cell("lq.parse_split('W4B4')", lq.InputError)
    assert lines[0] == "Traceback (most recent call last):\n"
    assert len(lines) > 3


def test_the_line_of_the_cell_is_named(monkeypatch):
    frame = traceback.FrameSummary("/anywhere/ipykernel_1/2.py", 3, "<module>", line="study.best()")
    monkeypatch.setattr(traceback, "extract_tb", lambda _: [frame])
    shown = lq.InputError("why")._render_traceback_()
    assert shown == ["InputError: why", "  in line 3 of the cell: study.best()"]
