"""A few hundred hostile files for every reader; `benchmarks/fuzz.py` runs 240,000."""

import pytest

CASES = {
    "torch": 150,
    "safetensors": 400,
    "npz": 300,
    "gguf": 300,
    "index": 150,
    "config": 80,
    "onnx": 200,
    "nunchaku": 100,
    "adapter": 150,
    "accelerator": 40,
    "plan": 200,
    "measured": 150,
    "store": 100,
    "quantized": 200,
}


@pytest.mark.parametrize("name", CASES)
def test_every_file_is_read_or_refused_in_one_line(name, guard, monkeypatch):
    from fuzz_worker import fuzz_unguided

    if name == "onnx":
        pytest.importorskip("onnx")
    # Put back after the test: the fuzzer has its caches in its scratch folder.
    monkeypatch.setenv("LORAQ_SIM_CACHE", "")
    counts = fuzz_unguided(name, CASES[name], 1, None, guard)
    assert counts["defects"] == {}
    # A fuzzer whose files are all refused, or all read, tests nothing.
    assert counts["read"] > 0
    # What a config says is taken where it makes sense; the checkpoint is read all the same.
    assert counts["refused"] > 0 or name == "config"
    assert counts["read"] + counts["refused"] == counts["cases"] == CASES[name]
