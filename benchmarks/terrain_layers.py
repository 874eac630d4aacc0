"""Layers of a trained diffusion U-Net with the inputs of eight noise levels, as a layer dump.

    pip install adaptive-terrain-diffusion onnx onnxruntime   # in an environment of its own
    python benchmarks/terrain_layers.py TERRAIN.npz           # then read by four_bit_activations.py

The package (MIT; a consistency model of 128 x 128 heightfields, 45 MB in ONNX) is run by
onnxruntime. Its convolutions of 3 x 3 become matrices over patches (im2col): K = 9 Cin, one row a
pixel. Heightfields that the model makes of noise are the clean ones; to them comes noise of eight
levels from 0.002 to 80, evenly in the logarithm, and each layer keeps as many rows of every level.
Inputs reach 700,000, beyond fp16: they are divided by 64, which no relative error knows of but
through the ranges of 16-bit scales and outputs.
"""

import argparse
from pathlib import Path

import numpy as np

LEVELS = np.geomspace(0.002, 80.0, 8).astype(np.float32)
ROWS_PER_LEVEL = 128
IMAGES = 4
# Of each width one, in the order of the graph: encoder, qkv, projection, middle, decoder.
EVERY = 18
SMALLER = np.float32(1 / 64)
LEAST_CHANNELS = 64


def chosen(graph, weights):
    """Every 18th convolution of at least 64 channels in and out, from the first on."""
    wide = [
        node
        for node in graph.node
        if node.op_type == "Conv" and min(weights[node.input[1]].shape[:2]) >= LEAST_CHANNELS
    ]
    return wide[::EVERY]


def patches(x, height):
    """Rows (images * pixels, 9 Cin or Cin) that a zero-padded convolution of `height` reads."""
    pad = height // 2
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, height), axis=(2, 3))
    images, channels, rows, columns = windows.shape[:4]
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(images * rows * columns, -1)


def captured(path):
    """Weight (N, K) and rows (T, K) of each chosen layer, by its name in the graph."""
    import onnx
    import onnxruntime
    from onnx import numpy_helper

    model = onnx.load(path)
    weights = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    nodes = chosen(model.graph, weights)
    names = dict.fromkeys(node.input[0] for node in nodes)
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    rng = np.random.default_rng(0)
    difficulty = np.linspace(0, 1, IMAGES, dtype=np.float32)

    def run(noisy, sigma):
        sigmas = np.full(IMAGES, sigma, dtype=np.float32)
        feeds = {"noisy": noisy, "sigma": sigmas, "difficulty": difficulty}
        return dict(
            zip(("denoised", *names), session.run(["denoised", *names], feeds), strict=True)
        )

    noise = rng.standard_normal((IMAGES, 1, 128, 128), dtype=np.float32)
    clean = run(noise * LEVELS[-1], LEVELS[-1])["denoised"]
    rows = {node.name: [] for node in nodes}
    for sigma in LEVELS:
        noise = rng.standard_normal(clean.shape, dtype=np.float32)
        seen = run(clean + sigma * noise, sigma)
        for node in nodes:
            x = patches(seen[node.input[0]], weights[node.input[1]].shape[2])
            rows[node.name].append(
                x[rng.choice(len(x), ROWS_PER_LEVEL, replace=len(x) < ROWS_PER_LEVEL)]
            )
    return {
        node.name.removeprefix("node_"): (
            weights[node.input[1]].reshape(len(weights[node.input[1]]), -1),
            np.concatenate(rows[node.name]) * SMALLER,
        )
        for node in nodes
    }


def main():
    """Write one array a weight and one a layer's inputs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--model", type=Path, help="the ONNX file, where the package is not installed"
    )
    options = parser.parse_args()
    model = options.model
    if model is None:
        import terrain_diffusion

        model = next((Path(terrain_diffusion.__file__).parent / "weights").glob("*.onnx"))
    arrays = {}
    for name, (weight, rows) in captured(str(model)).items():
        arrays[f"{name}.weight"], arrays[f"{name}.activations"] = weight, rows
        print(name, weight.shape, rows.shape, f"largest input {np.abs(rows).max():.3g}")
    np.savez(options.out, **arrays)


if __name__ == "__main__":
    main()
