"""The line of each key in a TOML document."""

from __future__ import annotations

import tomllib
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox_gateway.profiles.lines import Key, key_lines

DOCUMENT = '''# a comment with [brackets] and = signs
top = 1

[a]            # 4
x = "quote \\" ] }" # 5
"quoted key" = 'C:\\' # 6
d.e.f = 1      # 7
text = """
[not.a.table]
key = "not a key"
ends with quotes"""""   # 11
after = [      # 12
  1,           # 13
  # nothing
  { p = 1, q = [2,
     3] },     # 16
]
[[list]]       # 18
n = 1          # 19
[list.sub]     # 20
k = 1979-05-27T07:32:00Z # 21
[[list]]       # 22
n = 2          # 23
[list.sub]     # 24
k = +inf       # 25
'''


def test_each_kind_of_key_has_its_line() -> None:
    lines = key_lines(DOCUMENT)
    expected: dict[Key, int] = {
        ("top",): 2,
        ("a",): 4,
        ("a", "x"): 5,
        ("a", "quoted key"): 6,
        ("a", "d"): 7,
        ("a", "d", "e", "f"): 7,
        ("a", "text"): 8,
        ("a", "after"): 12,
        ("a", "after", 0): 13,
        ("a", "after", 1, "p"): 15,
        ("a", "after", 1, "q", 1): 16,
        ("list",): 18,
        ("list", 0, "n"): 19,
        ("list", 0, "sub", "k"): 21,
        ("list", 1): 22,
        ("list", 1, "n"): 23,
        ("list", 1, "sub"): 24,
        ("list", 1, "sub", "k"): 25,
    }
    assert {key: lines.get(key) for key in expected} == expected


def _keys(value: Any, key: Key = ()) -> set[Key]:
    found = {key} if key else set()
    if isinstance(value, dict):
        for name, item in value.items():
            found |= _keys(item, (*key, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            found |= _keys(item, (*key, index))
    return found


def test_the_lines_cover_exactly_the_keys_of_the_document() -> None:
    lines = key_lines(DOCUMENT)
    missing = _keys(tomllib.loads(DOCUMENT)) - set(lines)
    assert missing == set() and set(lines) <= _keys(tomllib.loads(DOCUMENT))


SCALARS = st.one_of(
    st.integers(-5, 5).map(str),
    st.sampled_from(['"a # b"', "'c = [d'", '"""\nx\n"""', "'''y'''", "true", "1e3", '"\\""', "[]", "{}"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: "[" + ",\n ".join(items) + "]"),
        st.lists(inner, max_size=3).map(
            lambda items: "{" + ", ".join(f"k{i} = {item}" for i, item in enumerate(items)) + "}"
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(VALUES, st.sampled_from(["", "# c\n", "\n\n"])), max_size=5))
def test_any_document_of_ours_has_a_line_for_each_of_its_keys(items: list[tuple[str, str]]) -> None:
    text = "".join(f"{gap}key{i} = {value}\n" for i, (value, gap) in enumerate(items))
    lines = key_lines(text)
    assert set(lines) == _keys(tomllib.loads(text))
    rows = text.split("\n")
    for i in range(len(items)):
        assert rows[lines[(f"key{i}",)] - 1].startswith(f"key{i} = ")
