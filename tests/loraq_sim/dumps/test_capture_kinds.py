import pytest

from loraq_sim.dumps.kinds import kinds_of, list_models, load_inventory


@pytest.mark.parametrize("model", list_models())
def test_names_of_published_models_give_the_inventory_s_kinds(model):
    layers = [layer for layer in load_inventory(model).layers if layer.is_gemm]
    assert kinds_of(layer.name for layer in layers) == {x.name: x.kind for x in layers}


def test_other_names_are_plain_linear_layers():
    assert kinds_of(["encoder.layer.0.dense", "my_attn1.to_q", "model"]) == {
        "encoder.layer.0.dense": "linear",
        "my_attn1.to_q": "linear",
        "model": "linear",
    }
