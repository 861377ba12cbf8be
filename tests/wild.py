"""Values that nobody expects where JSON or a caller in Python may put them: the input of the fuzzers."""

from hypothesis import strategies as st

HUGE = [10**9, 2**31, 2**53 + 1, 2**64, 10**30, 10**400, -1, -(10**400)]
FLOATS = [0.0, -0.0, 1e-300, 1e-5, 0.5, 1e20, 1e300, float("inf"), float("-inf"), float("nan")]
TEXTS = ["", "\0", "\ud800", "²", "01", "1", "a", "auto", "~nobody knows/x", "x" * 5000, "{}", "NaN"]


def nested(depth):
    """A list in a list in a list."""
    value = []
    for _ in range(depth):
        value = [value]
    return value


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from(HUGE),
    st.floats(0, 2),
    st.sampled_from(FLOATS),
    st.text(max_size=8),
    st.sampled_from(TEXTS),
)
KEYS = st.one_of(st.text(max_size=5), st.sampled_from(["a", "n", "1", "²", "01", "role", "model", "k" * 5000]))
VALUES = st.one_of(
    st.recursive(
        SCALARS,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from([10, 400, 5000]).map(nested),
)
