import dataclasses
import pickle
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from loraq_sim.errors import InputError
from loraq_sim.layers import Layer, check_count, check_shapes

GOLDEN_DIGEST = "965331e31906ac1e3acacf9116cab82fb096baa5ab7f3ade6699e96872b29b6c"


def ramp(*shape, dtype=np.float32):
    return np.arange(np.prod(shape), dtype=np.float64).reshape(shape).astype(dtype)


def test_sizes_come_from_the_arrays():
    layer = Layer(name="fc", weight=ramp(3, 5), bias=ramp(3), activations=ramp(7, 5))
    assert (layer.n, layer.k, layer.m) == (3, 5, 7)
    assert repr(layer) == "Layer('fc', kind='linear', n=3, k=5, tokens=7)"


def test_rows_of_a_call_default_to_the_sampled_rows_and_are_never_guessed():
    silent = Layer(name="fc", weight=ramp(3, 5))
    assert (silent.m, silent.m_source) == (None, "")
    assert Layer(name="fc", weight=ramp(3, 5), activations=ramp(7, 5)).m == 7
    layer = Layer(name="fc", weight=ramp(3, 5), activations=ramp(7, 5), rows_per_call=np.int64(96))
    assert layer.m == 96
    assert type(layer.rows_per_call) is int


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, ">f4"])
def test_floating_dtypes_become_contiguous_float32_with_equal_values(dtype):
    weight = ramp(4, 6, dtype=dtype)[:, ::2]
    layer = Layer(name="fc", weight=weight, bias=ramp(4, dtype=dtype))
    assert layer.weight.dtype == layer.bias.dtype == np.dtype("<f4")
    assert layer.weight.flags.c_contiguous
    np.testing.assert_array_equal(layer.weight, weight.astype(np.float32))


def test_float32_contiguous_arrays_are_kept_without_a_copy():
    weight = ramp(4, 6)
    assert Layer(name="fc", weight=weight).weight is weight


def test_nested_lists_and_torch_tensors_are_accepted():
    torch = pytest.importorskip("torch")
    expected = ramp(2, 3)
    np.testing.assert_array_equal(Layer(name="fc", weight=expected.tolist()).weight, expected)
    tensor = torch.arange(6, dtype=torch.float16).reshape(2, 3)
    np.testing.assert_array_equal(Layer(name="fc", weight=tensor).weight, expected)


def test_the_input_is_not_modified():
    weight = ramp(4, 6, dtype=np.float64)
    before = weight.copy()
    Layer(name="fc", weight=weight)
    np.testing.assert_array_equal(weight, before)


def test_fields_cannot_be_replaced():
    layer = Layer(name="fc", weight=ramp(2, 2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        layer.weight = ramp(2, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": None}, "weight is None; give an array of shape (N, K)"),
        ({"weight": ramp(6)}, "weight has shape (6,), expected 2-D (N, K)"),
        ({"weight": ramp(2, 3, 1, 1)}, "weight has shape (2, 3, 1, 1), expected 2-D (N, K)"),
        ({"weight": ramp(0, 3)}, "weight is empty (shape (0, 3))"),
        ({"weight": ramp(2, 3, dtype=np.int8)}, "weight has dtype int8; expected float16"),
        ({"weight": ramp(2, 3, dtype=np.complex64)}, "weight has dtype complex64"),
        ({"weight": np.array([["a", None]], dtype=object)}, "weight has dtype object"),
        (
            {"weight": [[1.0, 2.0], [3.0]]},
            "weight must be a NumPy array or a torch tensor, got list",
        ),
        ({"bias": ramp(3)}, "bias has shape (3,), expected (2,) for weight of shape (2, 3)"),
        ({"bias": ramp(2, 1)}, "bias has shape (2, 1), expected (2,)"),
        ({"bias": ramp(2, dtype=np.int32)}, "bias has dtype int32"),
        ({"activations": ramp(4, 2)}, "activations have shape (4, 2), expected (tokens, 3)"),
        ({"activations": ramp(1, 4, 3)}, "activations have shape (1, 4, 3), expected (tokens, 3)"),
        ({"activations": ramp(0, 3)}, "activations are empty (shape (0, 3)); leave them out"),
        ({"kind": 3}, "kind must be a string, got int"),
        ({"group": None}, "group must be a string, got NoneType"),
        ({"rows_per_call": 0}, "rows_per_call must be a positive integer up to 2**40, got 0"),
        ({"rows_per_call": 2.0}, "rows_per_call must be a positive integer up to 2**40, got 2.0"),
        ({"calls_per_step": -1}, "calls_per_step must be a positive integer up to 2**40, got -1"),
        ({"calls_per_step": True}, "calls_per_step must be a positive integer"),
        ({"calls_per_step": None}, "calls_per_step must be a positive integer"),
        ({"calls_per_step": 10**9999}, "calls_per_step must be a positive integer"),
    ],
)
def test_a_bad_field_is_refused_with_layer_tensor_and_value(changes, message):
    good = {"name": "block.3.fc", "weight": ramp(2, 3), "bias": ramp(2), "activations": ramp(4, 3)}
    with pytest.raises(InputError, match=re.escape(f"layer 'block.3.fc': {message}")) as caught:
        Layer(**{**good, **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[31mred", "x" * 501, None, 7])
def test_a_name_must_be_printable_text(name):
    with pytest.raises(InputError, match="a layer name must be a non-empty printable string"):
        Layer(name=name, weight=ramp(2, 2))


@pytest.mark.parametrize("tensor", ["weight", "bias", "activations"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_counted_and_the_first_is_located(tensor, value):
    arrays = {"weight": ramp(2, 3), "bias": ramp(2), "activations": ramp(4, 3)}
    spoiled = arrays[tensor]
    spoiled.reshape(-1)[1] = spoiled.reshape(-1)[-1] = value
    count = 1 if spoiled.size == 2 else 2
    where = tuple(int(i) for i in np.unravel_index(1, spoiled.shape))
    message = f"{tensor} holds {count} of {spoiled.size} values that are NaN or Inf (first: {value}"
    with pytest.raises(InputError, match=re.escape(f"{message} at {where})")):
        Layer(name="fc", **arrays)


def test_a_float64_value_beyond_float32_is_refused_by_name():
    weight = ramp(2, 3, dtype=np.float64)
    weight[1, 2] = 1e39
    with pytest.raises(InputError, match=r"beyond the float32 range \(first: 1e\+39 at \(1, 2\)\)"):
        Layer(name="fc", weight=weight)


def test_digest_ignores_the_name_and_follows_everything_else():
    def digest(**changes):
        fields = {"name": "fc", "weight": ramp(2, 3), "bias": ramp(2), "activations": ramp(4, 3)}
        return Layer(**{**fields, **changes}).digest()

    reference = digest()
    assert re.fullmatch("[0-9a-f]{64}", reference)
    assert digest(name="other", group="g") == reference
    assert digest(weight=ramp(2, 3, dtype=np.float16)) == reference
    changed = [
        digest(weight=ramp(2, 3) + 1),
        digest(bias=None),
        digest(bias=ramp(2) + 1),
        digest(activations=None),
        digest(activations=ramp(4, 3) + 1),
        digest(activations=ramp(3, 3)),
        digest(kind="ffn_up"),
        digest(rows_per_call=4),
        digest(calls_per_step=2),
    ]
    assert len({reference, *changed}) == 1 + len(changed)


def test_digest_tells_equal_bytes_of_different_shapes_apart():
    assert (
        Layer(name="fc", weight=ramp(2, 3)).digest() != Layer(name="fc", weight=ramp(3, 2)).digest()
    )


def test_digest_is_the_same_in_every_process_and_version():
    # A stored value: result stores refer to layers by digest, so it may never drift.
    layer = Layer(name="fc", weight=ramp(2, 3), bias=ramp(2), activations=ramp(4, 3), kind="ffn_up")
    assert layer.digest() == GOLDEN_DIGEST


def test_a_layer_survives_pickling():
    layer = Layer(name="fc", weight=ramp(2, 3), bias=ramp(2), kind="ffn_up", rows_per_call=9)
    copy = pickle.loads(pickle.dumps(layer))
    assert copy.digest() == layer.digest()
    assert repr(copy) == repr(layer)


@given(
    weight=hnp.arrays(
        dtype=st.sampled_from([np.float16, np.float32, np.float64]),
        shape=hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
        elements=st.sampled_from([0.0, -1.5, 3.0, np.inf, np.nan]),
    )
)
def test_any_array_either_becomes_a_valid_layer_or_an_input_error(weight):
    is_valid = (
        weight.ndim == 2 and weight.size > 0 and not (np.isnan(weight) | np.isinf(weight)).any()
    )
    if is_valid:
        np.testing.assert_array_equal(Layer(name="fc", weight=weight).weight, weight)
    else:
        with pytest.raises(InputError, match="layer 'fc': weight "):
            Layer(name="fc", weight=weight)


def test_shapes_can_be_checked_without_arrays():
    check_shapes("fc", (10**9, 10**9), (10**9,), (5, 10**9))
    with pytest.raises(InputError, match="layer 'fc': bias has shape"):
        check_shapes("fc", (2, 3), (3,))


def test_a_count_returns_as_an_integer():
    assert check_count("fc", "calls_per_step", np.uint8(3)) == 3
