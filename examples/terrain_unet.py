"""An entry point for ``loraq-sim images``: a trained U-Net that makes heightfields, from PyPI.

pip install --no-deps adaptive-terrain-diffusion==0.4.2
loraq-sim images --checkpoint examples/terrain_unet.py:terrain --hw aie2 --split W8A8 --steps 1 \
    --images 2 --out runs/terrain

The package (MIT) carries a consistency model (arXiv 2303.01469) of 128 x 128 heightfields as an
ONNX graph, distilled for one step: noise of standard deviation 80 becomes a heightfield in one
call. `GraphModel` runs that graph in torch. Convolutions of 64 channels or more, in and out, run as
im2col (a row a pixel, K = 9 Cin) and a Linear, which is what is emulated; the rest stays in float:
narrower convolutions, the first and the last among them, attention, norms and the small layers that
embed noise level and difficulty.
"""

import importlib.resources
from pathlib import Path

import torch

LEAST_CHANNELS = 64
NOISE, SIZE = 80.0, 128
WEIGHTS = "weights/terrain_consistency_unet_difficulty100.onnx"


def terrain():
    """Return the U-Net, and how to draw with it."""
    import onnx

    try:
        path = Path(str(importlib.resources.files("terrain_diffusion"))) / WEIGHTS
    except ModuleNotFoundError:
        raise RuntimeError("pip install --no-deps adaptive-terrain-diffusion==0.4.2") from None
    return GraphModel(onnx.load(path)), draw


def draw(*, steps, images, guidance, seed, first):
    """Denoise heightfields of several difficulties in one step; the model takes no guidance."""
    if steps != 1:
        raise ValueError(f"the model is distilled for one step, got {steps}; give --steps 1")
    numbers = range(first, first + images)
    noise = [
        torch.randn(1, SIZE, SIZE, generator=torch.Generator().manual_seed(1_000_033 * seed + i))
        for i in numbers
    ]
    clean = yield (
        NOISE,
        {
            "noisy": NOISE * torch.stack(noise),
            "sigma": torch.full((images,), NOISE),
            "difficulty": torch.tensor([0.2 + 0.2 * (i % 5) for i in numbers]),
        },
    )
    return clean


class PatchConv(torch.nn.Module):
    """A convolution of stride 1 that keeps its size, as a Linear over patches."""

    def __init__(self, weight, bias) -> None:
        super().__init__()
        self.height = weight.shape[2]
        rows = weight.flatten(1)
        self.gemm = torch.nn.Linear(rows.shape[1], rows.shape[0])
        self.gemm.weight.data.copy_(rows)
        self.gemm.bias.data.copy_(bias)

    def forward(self, x):
        """Map (images, Cin, height, width) to (images, Cout, height, width)."""
        patches = x
        if self.height > 1:
            patches = torch.nn.functional.unfold(x, self.height, padding=self.height // 2)
        rows = patches.reshape(len(x), -1, x.shape[2] * x.shape[3]).transpose(1, 2)
        return self.gemm(rows).transpose(1, 2).reshape(len(x), -1, *x.shape[2:])


class GraphModel(torch.nn.Module):
    """An ONNX graph of the operators below, run by torch one node after the other."""

    def __init__(self, model) -> None:
        super().__init__()
        from onnx import helper, numpy_helper

        graph = model.graph
        self.values = {x.name: torch.from_numpy(numpy_helper.to_array(x).copy())
                       for x in graph.initializer}  # fmt: skip
        self.inputs = [x.name for x in graph.input if x.name not in self.values]
        self.output = graph.output[0].name
        self.nodes, self.last_use = [], {}
        for place, node in enumerate(graph.node):
            options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type == "Conv":
                self._keep_conv(node, options)
            elif node.op_type not in OPERATORS:
                raise ValueError(
                    f"operator {node.op_type} of {node.name}: not one of {', '.join(OPERATORS)}"
                )
            self.nodes.append((node.op_type, list(node.input), list(node.output), options))
            self.last_use |= dict.fromkeys(node.input, place)

    def _keep_conv(self, node, options) -> None:
        weight, bias = self.values[node.input[1]], self.values[node.input[2]]
        height = weight.shape[2]
        same = [height // 2] * 4
        plain = options["strides"] == [1, 1] and options["group"] == 1 and options["pads"] == same
        if not plain or weight.shape[3] != height:
            raise ValueError(f"convolution {node.input[1]}: must have stride 1 and equal sides")
        if min(weight.shape[:2]) >= LEAST_CHANNELS:
            # A module's name has no dots.
            name = node.input[1].removesuffix(".weight").replace(".", "_")
            self.add_module(name, PatchConv(weight, bias))
            options["module"] = name

    def forward(self, **inputs):
        """Return the graph's first output."""
        values = dict(inputs)
        for place, (kind, names, outputs, options) in enumerate(self.nodes):
            x = [values[n] if n in values else self.values.get(n) for n in names]
            if kind == "Conv":
                module = options.get("module")
                padding = x[1].shape[2] // 2
                plain = torch.nn.functional.conv2d
                y = getattr(self, module)(x[0]) if module else plain(*x, padding=padding)
            else:
                y = OPERATORS[kind](options, *x)
            values |= zip(outputs, y if isinstance(y, tuple) else (y,), strict=True)
            for name in names:
                if self.last_use[name] == place:
                    values.pop(name, None)
        return values[self.output]


def _reshape(options, x, shape):
    sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(shape.tolist())]
    return x.reshape(sizes)


def _shape(options, x):
    return torch.tensor(x.shape[options.get("start", 0) : options.get("end", len(x.shape))])


def _unsqueeze(options, x, axes):
    for axis in sorted(axes.reshape(-1).tolist()):
        x = x.unsqueeze(axis)
    return x


def _squeeze(options, x, axes=None):
    return x.squeeze() if axes is None else x.squeeze(tuple(axes.reshape(-1).tolist()))


def _split(options, x, sizes=None):
    axis = options.get("axis", 0)
    if sizes is None:
        return x.chunk(options["num_outputs"], axis)
    return x.split(sizes.tolist(), axis)


def _gemm(options, a, b, c=0):
    return a @ (b.T if options.get("transB") else b) + c


def _pool(options, x):
    return torch.nn.functional.avg_pool2d(x, options["kernel_shape"], options["strides"])


def _resize(options, x, roi, scales):
    if options["mode"] != b"nearest":
        raise ValueError(f"resize by {options['mode']}: must be nearest")
    rows, columns = (int(scale) for scale in scales.tolist()[2:])
    return x.repeat_interleave(rows, 2).repeat_interleave(columns, 3)


def _norm(options, x, weight, bias):
    return torch.nn.functional.instance_norm(x, weight=weight, bias=bias, eps=options["epsilon"])


OPERATORS = {
    "Add": lambda options, a, b: a + b,
    "AveragePool": _pool,
    "Clip": lambda options, x, low, high: torch.minimum(torch.maximum(x, low), high),
    "Concat": lambda options, *x: torch.cat(x, options["axis"]),
    "Cos": lambda options, x: x.cos(),
    "Div": lambda options, a, b: a / b,
    "Einsum": lambda options, *x: torch.einsum(options["equation"].decode(), *x),
    "Gemm": _gemm,
    "InstanceNormalization": _norm,
    "Log": lambda options, x: x.log(),
    "Mul": lambda options, a, b: a * b,
    "Pow": lambda options, a, b: a**b,
    "Reciprocal": lambda options, x: x.reciprocal(),
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Sigmoid": lambda options, x: x.sigmoid(),
    "Sin": lambda options, x: x.sin(),
    "Softmax": lambda options, x: x.softmax(options.get("axis", -1)),
    "Split": _split,
    "Sqrt": lambda options, x: x.sqrt(),
    "Squeeze": _squeeze,
    "Sub": lambda options, a, b: a - b,
    "Unsqueeze": _unsqueeze,
}
