"""Capture records every product with a weight: convolutions, fused projections, experts.

What is recorded must give what the model computed: rows times weight plus bias are the output of
the module itself, by torch's own convolution and attention.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from loraq_sim.dumps.capture import CaptureSource, capture_layers
from loraq_sim.errors import DumpError

TOKENS = 4096


def captured(model, *inputs, patterns=()):
    """The dump of one call, and the outputs of the modules by name."""
    outputs = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, args, out, name=name: outputs.setdefault(name, out))
    source = CaptureSource(name="test", model=model, calls=[(0, inputs)])
    return capture_layers(source, tokens=TOKENS, patterns=patterns), outputs


def product(layer):
    bias = 0 if layer.bias is None else layer.bias
    return layer.activations.astype(np.float64) @ layer.weight.T + bias


CONVOLUTIONS = {
    "strided": (nn.Conv2d(3, 8, 3, stride=2, padding=1), (2, 3, 17, 16)),
    "dilated": (nn.Conv2d(4, 6, (3, 5), padding="same", dilation=(1, 2)), (1, 4, 9, 11)),
    "circular": (nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="circular"), (2, 4, 9, 11)),
    "reflect": (nn.Conv1d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 9)),
    "unbatched": (nn.Conv1d(4, 6, 5, bias=False), (4, 9)),
    "three axes": (nn.Conv3d(2, 5, (2, 3, 1), stride=(1, 2, 3), padding=1), (2, 2, 5, 6, 7)),
    "even, same": (nn.Conv2d(3, 4, 4, padding="same"), (1, 3, 6, 7)),
    "1x1, strided": (nn.Conv2d(4, 6, 1, stride=2), (2, 4, 9, 8)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_the_gemm_of_im2col(name):
    module, shape = CONVOLUTIONS[name]
    torch.manual_seed(1)
    x = torch.randn(*shape)
    dump, outputs = captured(nn.Sequential(module), x)
    layer = dump["0"]
    out = outputs["0"].detach().numpy()
    out = np.moveaxis(out, 1 if len(shape) == out.ndim and name != "unbatched" else 0, -1)
    out = out.reshape(-1, len(layer.weight))
    assert layer.m == len(out)
    assert layer.k == module.weight[0].numel()
    np.testing.assert_array_equal(layer.weight, module.weight.detach().flatten(1).numpy())
    # float32 sums of at most 60 products of the size of 1.
    np.testing.assert_allclose(product(layer), out, atol=60 * 2**-23)


def test_a_sample_of_patches_is_made_of_patches():
    torch.manual_seed(1)
    module = nn.Conv2d(3, 4, 3, padding=1)
    source = CaptureSource(
        name="test", model=nn.Sequential(module), calls=[(0, (torch.randn(2, 3, 20, 20),))] * 2
    )
    (x,) = source.calls[0][1]
    dump = capture_layers(source, tokens=50)
    patches = functional.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 27).numpy()
    known = {row.tobytes() for row in patches}
    rows = dump["0"].activations
    assert len(rows) == 50
    assert dump["0"].m == len(patches)
    assert all(row.tobytes() in known for row in rows)


def test_two_convolutions_share_an_input_only_where_their_patches_are_one():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 5, 3, padding=1)
            self.other = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.one(x), self.two(x), self.other(x)

    dump, _ = captured(Model(), torch.randn(1, 3, 8, 8))
    infos = {name: dump.info(name) for name in dump}
    assert infos["one"].activation_key == infos["two"].activation_key
    assert infos["one"].activation_key != infos["other"].activation_key
    assert (infos["one"].m, infos["other"].m) == (64, 36)


@pytest.mark.parametrize("kind", ["self", "text", "all apart"])
def test_multihead_attention_is_recorded_with_the_names_of_a_checkpoint(kind):
    torch.manual_seed(2)
    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    x, text = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    inputs = {
        "self": (x, x, x),
        "text": (x, text, text),
        "all apart": (x, text, text.clone()),
    }[kind]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = attention

        def forward(self, *parts):
            return self.attn(*parts, need_weights=False)

    dump, outputs = captured(Model(), *inputs)
    parts = {"self": [""], "text": [".q", ".kv"], "all apart": [".q", ".k", ".v"]}[kind]
    assert set(dump) == {*(f"attn.in_proj{part}" for part in parts), "attn.out_proj"}
    stacked = np.concatenate([dump[f"attn.in_proj{part}"].weight for part in parts])
    np.testing.assert_array_equal(stacked, attention.in_proj_weight.detach().numpy())
    out = outputs["attn"][0].detach().numpy().reshape(-1, 16)
    found = product(dump["attn.out_proj"])
    # out_proj runs on (tokens, batch): the same rows in another order.
    np.testing.assert_allclose(found[np.lexsort(found.T)], out[np.lexsort(out.T)], atol=16 * 2**-23)


class Conv1D(nn.Module):
    """As transformers has it."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.shape[:-1], self.nf)


def test_a_layer_that_keeps_its_weight_turned_is_a_linear_layer():
    dump, outputs = captured(nn.Sequential(Conv1D(12, 8)), torch.randn(2, 3, 8))
    assert (dump.info("0").n, dump.info("0").k) == (12, 8)
    out = outputs["0"].detach().numpy().reshape(-1, 12)
    np.testing.assert_allclose(product(dump["0"]), out, atol=8 * 2**-22)


class Experts(nn.Module):
    def __init__(self, way):
        super().__init__()
        torch.manual_seed(3)
        self.way = way
        shape = (3, 12, 8) if way == "linear" else (3, 8, 12)
        self.gate_up_proj = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        if self.way == "bmm":
            return torch.bmm(x, self.gate_up_proj)
        if self.way == "matmul":
            return torch.stack([x[i] @ self.gate_up_proj[i] for i in (0, 1, 2)])
        return torch.stack([functional.linear(x[i], self.gate_up_proj[i]) for i in (0, 1, 2)])


@pytest.mark.parametrize("way", ["bmm", "matmul", "linear"])
def test_experts_of_one_tensor_are_layers_of_their_own(way):
    model = nn.ModuleDict({"experts": Experts(way)})
    model.forward = model["experts"].forward
    x = torch.randn(3, 5, 8)
    dump, outputs = captured(model, x)
    assert list(dump) == [f"experts.gate_up_proj.{i}" for i in range(3)]
    for i, name in enumerate(dump):
        np.testing.assert_array_equal(dump[name].activations, x[i].numpy())
        out = outputs[""][i].detach().numpy()
        np.testing.assert_allclose(product(dump[name]), out, atol=8 * 2**-21)


def test_parameters_multiplied_by_functions_obey_layer_patterns():
    model = nn.ModuleDict({"experts": Experts("matmul"), "last": nn.Linear(12, 4)})
    model.forward = lambda x: model["last"](model["experts"](x))
    dump, _ = captured(model, torch.randn(3, 5, 8), patterns=["experts.*.1", "last"])
    assert list(dump) == ["last", "experts.gate_up_proj.1"]


class LoraLinear(nn.Module):
    """A layer of PEFT, as far as capture looks at it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        n, k = base.weight.shape
        self.lora_A = nn.ModuleDict({"style": nn.Linear(k, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"style": nn.Linear(2, n, bias=False)})
        self.active_adapters, self.merged, self.use_dora = ["style"], False, {}

    def get_delta_weight(self, adapter):
        return 0.5 * self.lora_B[adapter].weight @ self.lora_A[adapter].weight

    def forward(self, x):
        out = self.base_layer(x)
        return out if self.merged else out + 0.5 * self.lora_B["style"](self.lora_A["style"](x))


def test_a_layer_with_an_adapter_of_peft_is_one_layer():
    torch.manual_seed(4)
    model = nn.ModuleDict({"q": LoraLinear(nn.Linear(8, 6)), "k": nn.Linear(8, 6)})
    model.forward = lambda x: model["q"](x) + model["k"](x)
    dump, outputs = captured(model, torch.randn(5, 8))
    assert list(dump) == ["q", "k"]
    assert dump.info("q").activation_key == dump.info("k").activation_key
    np.testing.assert_allclose(product(dump["q"]), outputs["q"].detach().numpy(), atol=2.0**-20)
    assert dump.left_out == ""
    model["q"].use_dora = {"style": True}
    with pytest.raises(DumpError, match="adapter 'style' is DoRA; merge it first"):
        captured(model, torch.randn(5, 8))


def test_what_is_no_product_is_named_with_its_share():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(100, 8)
            self.wide = nn.Conv1d(8, 8, 3, groups=8, padding=1)
            self.last = nn.Linear(8, 8)

        def forward(self, ids):
            return self.last(self.wide(self.table(ids).transpose(1, 2)).transpose(1, 2))

    dump, _ = captured(Model(), torch.arange(6)[None])
    share = 100 * (800 + 24) / (800 + 24 + 64)
    assert f"left out: 2 tensors with {share:.3g} % of the weights" in dump.left_out
    assert "table.weight: a table that is looked up" in dump.left_out


def test_functions_are_as_before_afterwards():
    linear, was_fast = functional.linear, torch.backends.mha.get_fastpath_enabled()
    model = nn.ModuleDict({"experts": Experts("bmm")})
    model.forward = model["experts"].forward
    captured(model, torch.randn(3, 5, 8))
    assert functional.linear is linear
    assert torch.backends.mha.get_fastpath_enabled() == was_fast
