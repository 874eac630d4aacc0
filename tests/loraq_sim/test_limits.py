import pytest

from loraq_sim.errors import InputError
from loraq_sim.results.columns import parse_limits

KNOWN = ("latency_s", "weight_bytes", "energy_j", "output_error", "rank")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("latency_s=0.003", 0.003),
        ("latency_s=2.95ms", 0.00295),
        ("latency_s = 3 us", 3e-6),
        ("latency_s=3µs", 3e-6),
        ("weight_bytes=400e6", 4e8),
        ("weight_bytes=400MB", 4e8),
        ("weight_bytes=1.5GiB", 1.5 * 2**30),
        ("energy_j=5pJ", 5e-12),
        ("output_error=5%", 0.05),
        ("rank=32", 32.0),
    ],
)
def test_units_of_a_column_are_read_exactly(text, value):
    assert list(parse_limits([text], KNOWN).values()) == [value]


def test_limits_are_repeated_or_separated_by_commas():
    limits = parse_limits(["latency_s=3ms,rank=4", " output_error=2% "], KNOWN)
    assert limits == {"latency_s": 0.003, "rank": 4.0, "output_error": 0.02}
    assert parse_limits([], KNOWN) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("latency_s", "must look like latency_s=3ms"),
        ("=3", "must look like"),
        ("latency=3", "unknown column 'latency'; did you mean 'latency_s'"),
        ("latency_s=3MB", "want a number, with ns, us, µs, ms, s"),
        ("rank=3ms", "with no unit"),
        ("latency_s=1e400x", "want a number"),
        ("latency_s=nan", "want a number"),
        ("latency_s=1,latency_s=2", "two limits"),
    ],
)
def test_what_is_no_limit_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_limits([text], KNOWN)
