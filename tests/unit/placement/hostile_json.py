"""What a fuzz of a reader of JSON draws from."""

from hypothesis import strategies as st

# Any value.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)

# Put anywhere into a text.
BYTES = [
    "",
    " ",
    "0",
    "9",
    "-",
    "[",
    "]",
    "{}",
    ",",
    ":",
    '"',
    ".",
    "e5",
    "e999",
    "\x00",
    "\ud800",
    "é",
    "true",
    "null",
    "NaN",
    "1e999",
    "[]",
    '"a":1,',
]
