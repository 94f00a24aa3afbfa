"""Our reading of ``profiles.schema.json`` and the jsonschema package's agree."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandbox_gateway.profiles import schema
from sandbox_gateway.profiles.schema import faults

jsonschema = pytest.importorskip("jsonschema", reason="the reference validator is not installed")

SCALARS = st.one_of(
    st.sampled_from(
        ["none", "never", "2GiB", "50%", "0%", "10m", "1h30m", "", "5s5m", "rw", "ro", "keep", "host", "message"]
    ),
    st.sampled_from(
        ["host:/usr/bin/python3", "directory:/srv", "gvisor", "/a", "a", "KERNEL_*", "*", "A-B", "{connection_file}"]
    ),
    st.sampled_from([True, False, -1, 0, 1, 16, 128, 1.5, 2.0, 0.1, 1e18]),
    st.text(max_size=4).filter(lambda text: "\n" not in text),
)
NAMES = st.sampled_from(sorted(schema()["$defs"]["profile"]["properties"]))
MOUNT_KEYS = st.sampled_from(["source", "destination", "mode", "more"])
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.dictionaries(st.sampled_from(["pause", "suspend", "expire", "cpu", "A", "A-B"]), SCALARS, max_size=3),
    st.dictionaries(st.sampled_from(["created", "ready", "max_age", "x"]), SCALARS, max_size=3),
    st.lists(st.dictionaries(MOUNT_KEYS, SCALARS, max_size=4), max_size=2),
)
TABLES = st.dictionaries(st.one_of(NAMES, NAMES, st.just("unknown")), VALUES, max_size=4)
DOCUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "profiles": st.one_of(SCALARS, st.dictionaries(st.sampled_from(["a", "b.c", "Big", ".x"]), TABLES, max_size=2)),
        "settings": st.dictionaries(st.sampled_from(["snapshot_budget", "memory_reserve", "x"]), SCALARS, max_size=2),
    },
)


@pytest.fixture(scope="module")
def reference() -> Any:
    validator = jsonschema.Draft202012Validator
    validator.check_schema(dict(schema()))
    return validator(dict(schema()))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=DOCUMENTS)
def test_both_accept_and_refuse_the_same_documents(reference: Any, document: Any) -> None:
    assert bool(faults(document)) == (not reference.is_valid(document))


def test_each_key_of_a_profile_says_what_it_is_and_what_it_takes() -> None:
    definitions = schema()["$defs"]
    for name, node in definitions["profile"]["properties"].items():
        target = {**definitions.get(node.get("$ref", "").removeprefix("#/$defs/"), {}), **node}
        assert target.get("title"), name
        assert target.get("enum") or target.get("description"), name


def test_a_keyword_that_we_do_not_interpret_is_refused_rather_than_ignored() -> None:
    from sandbox_gateway.profiles.schema import _check

    with pytest.raises(ValueError, match="uniqueItems"):
        list(_check({"type": "array", "uniqueItems": True}, [], ()))
