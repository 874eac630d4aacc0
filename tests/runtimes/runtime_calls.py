"""One quantized layer in each runtime: functions of a `LayerCase` that return output codes.

Runtimes load inside the functions, so that one that is not installed is missing alone.
"""

import functools
import warnings

import numpy as np

_FLOAT = np.float32


# onnxruntime


def _session(nodes, inputs, outputs, initializers):
    import onnxruntime
    from onnx import helper, numpy_helper

    def described(items):
        return [helper.make_tensor_value_info(*item) for item in items]

    graph = helper.make_graph(
        nodes,
        "layer",
        described(inputs),
        described(outputs),
        [numpy_helper.from_array(np.asarray(v), k) for k, v in initializers.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _onnx_type(dtype):
    from onnx import TensorProto

    return {
        np.dtype("uint8"): TensorProto.UINT8,
        np.dtype("int8"): TensorProto.INT8,
        np.dtype("int32"): TensorProto.INT32,
        np.dtype("float32"): TensorProto.FLOAT,
    }[np.dtype(dtype)]


def _quantized_inputs(case):
    return {
        "a_scale": case.a_scale,
        "a_zero": np.asarray(case.a_zero, case.a.dtype),
        "w": np.ascontiguousarray(case.w.T),
        "w_scale": case.w_scale,
        "w_zero": case.w_zero,
    }


def _run_onnx(case, node, initializers, out_dtype):
    shape = (len(case.a), len(case.w))
    session = _session(
        [node],
        [("a", _onnx_type(case.a.dtype), case.a.shape)],
        [("y", _onnx_type(out_dtype), shape)],
        initializers,
    )
    return session.run(None, {"a": case.a})[0]


def onnx_qlinear_matmul(case, out_dtype):
    """QLinearMatMul: no bias, no clamp."""
    from onnx import helper

    inputs = _quantized_inputs(case)
    inputs |= {"y_scale": case.out_scale, "y_zero": np.asarray(case.zero_point, out_dtype)}
    names = ["a", "a_scale", "a_zero", "w", "w_scale", "w_zero", "y_scale", "y_zero"]
    return _run_onnx(case, helper.make_node("QLinearMatMul", names, ["y"]), inputs, out_dtype)


def onnx_qgemm(case, out_dtype):
    """QGemm with an int32 bias; float32 outputs where `out_dtype` is float32."""
    from onnx import helper

    bias = np.zeros(len(case.w)) if case.bias is None else case.bias
    inputs = _quantized_inputs(case) | {"bias": bias.astype(np.int32)}
    names = ["a", "a_scale", "a_zero", "w", "w_scale", "w_zero", "bias"]
    if np.dtype(out_dtype).kind != "f":
        inputs |= {"y_scale": case.out_scale, "y_zero": np.asarray(case.zero_point, out_dtype)}
        names += ["y_scale", "y_zero"]
    node = helper.make_node("QGemm", names, ["y"], domain="com.microsoft")
    return _run_onnx(case, node, inputs, out_dtype)


def onnx_matmul_integer(case):
    """MatMulInteger: int32 accumulators, no bias."""
    from onnx import helper

    inputs = {key: _quantized_inputs(case)[key] for key in ("a_zero", "w", "w_zero")}
    node = helper.make_node("MatMulInteger", ["a", "w", "a_zero", "w_zero"], ["y"])
    return _run_onnx(case, node, inputs, np.int32)


def onnx_dynamic_quantize_linear(x):
    """DynamicQuantizeLinear: codes, scale and zero point."""
    from onnx import TensorProto, helper

    session = _session(
        [helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "scale", "zero"])],
        [("x", TensorProto.FLOAT, x.shape)],
        [
            ("y", TensorProto.UINT8, x.shape),
            ("scale", TensorProto.FLOAT, ()),
            ("zero", TensorProto.UINT8, ()),
        ],
        {},
    )
    return session.run(None, {"x": x})


# LiteRT and TensorFlow Lite


def _schema():
    from ai_edge_litert import schema_py_generated

    return schema_py_generated


def fully_connected_model(case):
    """A .tflite file of one FULLY_CONNECTED, as bytes."""
    import flatbuffers

    s = _schema()
    types = {
        "int8": s.TensorType.INT8,
        "uint8": s.TensorType.UINT8,
        "int16": s.TensorType.INT16,
        "int32": s.TensorType.INT32,
        "int64": s.TensorType.INT64,
    }
    model, graph, operator = s.ModelT(), s.SubGraphT(), s.OperatorT()
    model.version, model.buffers, graph.tensors = 3, [s.BufferT()], []

    def add(name, values, shape, dtype, scale, zero):
        tensor, quantization = s.TensorT(), s.QuantizationParametersT()
        quantization.scale = [float(v) for v in np.ravel(scale)]
        quantization.zeroPoint = [int(v) for v in np.ravel(zero)]
        tensor.name, tensor.shape, tensor.type = name, list(shape), types[np.dtype(dtype).name]
        tensor.quantization, tensor.hasRank = quantization, True
        if values is not None:
            buffer = s.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(values, dtype).tobytes(), np.uint8)
            model.buffers.append(buffer)
            tensor.buffer = len(model.buffers) - 1
        graph.tensors.append(tensor)
        return len(graph.tensors) - 1

    (m, _), (n, _) = case.a.shape, case.w.shape
    zeros = np.broadcast_to(case.w_zero, case.w_scale.shape)
    graph.inputs = [add("a", None, case.a.shape, case.a.dtype, case.a_scale, case.a_zero)]
    operator.inputs = [
        *graph.inputs,
        add("w", case.w, case.w.shape, case.w.dtype, case.w_scale, zeros),
    ]
    wide = case.a.dtype == np.int16
    if case.bias is not None:
        scale = case.w_scale * case.a_scale
        dtype = np.int64 if wide else np.int32
        operator.inputs.append(add("bias", case.bias, (n,), dtype, scale, np.zeros(scale.shape)))
    else:
        operator.inputs.append(-1)
    out = add("y", None, (m, n), case.a.dtype, case.out_scale, case.zero_point)
    graph.outputs = operator.outputs = [out]
    options = s.FullyConnectedOptionsT()
    relu, none = s.ActivationFunctionType.RELU, s.ActivationFunctionType.NONE
    options.fusedActivationFunction = relu if case.relu else none
    if wide and case.bias is not None:
        options.quantizedBiasType = s.TensorType.INT64
    operator.builtinOptionsType = s.BuiltinOptions.FullyConnectedOptions
    operator.builtinOptions, operator.opcodeIndex = options, 0
    code = s.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = s.BuiltinOperator.FULLY_CONNECTED
    # The newest version that TensorFlow Lite 2.14 reads.
    code.version = 9
    graph.operators, graph.name = [operator], "main"
    model.operatorCodes, model.subgraphs, model.description = [code], [graph], "layer"
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def tflite_fully_connected(interpreter, model, a, kernels):
    """Run a model in an interpreter module: `kernels` AUTO, BUILTIN_REF or without delegates."""
    resolver = getattr(interpreter.OpResolverType, kernels)
    runner = interpreter.Interpreter(
        model_content=model, experimental_op_resolver_type=resolver, num_threads=1
    )
    runner.allocate_tensors()
    runner.set_tensor(runner.get_input_details()[0]["index"], a)
    runner.invoke()
    return runner.get_tensor(runner.get_output_details()[0]["index"])


def litert(case, kernels):
    """FULLY_CONNECTED in LiteRT."""
    from ai_edge_litert import interpreter

    return tflite_fully_connected(interpreter, fully_connected_model(case), case.a, kernels)


def tflite(case, kernels):
    """FULLY_CONNECTED in the TensorFlow Lite of tflite-runtime."""
    from tflite_runtime import interpreter

    return tflite_fully_connected(interpreter, fully_connected_model(case), case.a, kernels)


# PyTorch


def torch_linear(case, engine):
    """``torch.ops.quantized.linear`` on one of PyTorch's engines; uint8 outputs."""
    import torch

    scales = torch.from_numpy(case.w_scale.astype(np.float64))
    with warnings.catch_warnings():
        # Its quantized tensors are deprecated, its kernels are not.
        warnings.simplefilter("ignore")
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = engine
        try:
            a = torch._make_per_tensor_quantized_tensor(
                torch.from_numpy(case.a), float(case.a_scale), case.a_zero
            )
            if case.w_scale.ndim:
                zeros = torch.zeros(len(case.w), dtype=torch.long)
                w = torch._make_per_channel_quantized_tensor(
                    torch.from_numpy(case.w), scales, zeros, 0
                )
            else:
                w = torch._make_per_tensor_quantized_tensor(
                    torch.from_numpy(case.w), float(case.w_scale), 0
                )
            bias = None if case.bias is None else torch.from_numpy(case.real_bias)
            packed = torch.ops.quantized.linear_prepack(w, bias)
            ops = torch.ops.quantized
            run = ops.linear_relu if case.relu else ops.linear
            return run(a, packed, float(case.out_scale), case.zero_point).int_repr().numpy()
        finally:
            torch.backends.quantized.engine = before


# OpenVINO


@functools.cache
def _openvino_core():
    import openvino

    return openvino.Core()


def openvino_matmul(case):
    """MatMul between FakeQuantize operations, which the CPU plugin runs in int8; uint8 codes."""
    import openvino
    from openvino import opset13 as ops

    def constant(value):
        return ops.constant(np.asarray(value, _FLOAT))

    def interval(zero, scale):
        return [constant(_FLOAT(end - zero) * scale) for end in (0, 255)]

    x = ops.parameter(list(case.a.shape), np.float32, name="x")
    of_a = interval(case.a_zero, case.a_scale)
    quantized = ops.fake_quantize(x, *of_a, *of_a, 256)
    scale = case.w_scale.reshape(-1, 1) if case.w_scale.ndim else case.w_scale
    w = ops.multiply(ops.convert(ops.constant(case.w), "f32"), ops.constant(scale))
    y = ops.matmul(quantized, w, False, True)
    codes = [constant(0.0), constant(255.0)]
    y = ops.fake_quantize(y, *interval(case.zero_point, case.out_scale), *codes, 256)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    model = openvino.Model([ops.result(y)], [x], "layer")
    compiled = _openvino_core().compile_model(model, "CPU", settings)
    real = ((case.a.astype(_FLOAT) - _FLOAT(case.a_zero)) * case.a_scale).astype(_FLOAT)
    return compiled([real])[0].astype(np.uint8)
