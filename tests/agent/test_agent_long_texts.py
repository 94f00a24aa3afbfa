"""What a display carries goes into its message as it is, where that is what JSON makes of it."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from agent_host import Host
from hypothesis import given
from hypothesis import strategies as st
from jupyter_client.session import json_packer

from sandbox_gateway.agent.kernel_frugal import LONG, FrugalSession, with_plain_texts

IMAGE = base64.b64encode(bytes(range(256)) * (LONG // 256)).decode()
WORDS = st.sampled_from(["x", "a b", "\x7f", "é", "\udc80", "\n", '"', "\\", "\x00", "\x1f", "\u2028", "😀"])


def message(content: dict[str, Any]) -> dict[str, Any]:
    """A message as a kernel makes it."""
    return FrugalSession(key=b"k").msg("display_data", content)


@given(
    st.lists(st.tuples(WORDS, st.integers(0, 2 * LONG)), max_size=4),
    st.dictionaries(st.sampled_from(["text/plain", "image/png", 'odd "type"\n', "é"]), st.integers(0, 4), max_size=4),
)
def test_a_message_is_the_one_that_stock_makes(texts: list[tuple[str, int]], data: dict[str, int]) -> None:
    """Byte by byte, whatever its texts hold and wherever they stand."""
    choices = ["".join(word * times for word, times in texts), IMAGE, "x" * LONG, {"v": ["x" * LONG]}, math.pi]
    content = {"data": {mime: choices[n] for mime, n in data.items()}, "metadata": {"n": [IMAGE]}, "transient": {}}
    stock = json_packer(content)
    assert (with_plain_texts(content, json_packer) or stock) == stock


def test_each_character_is_written_as_stock_writes_it() -> None:
    """At the end of a text that goes in as it is but for that."""
    for number in (*range(256), 0x2028, 0xDC80, 0xFFFF, 0x1F600):
        content = {"data": {"text/plain": IMAGE + chr(number)}}
        stock = json_packer(content)
        assert (with_plain_texts(content, json_packer) or stock) == stock, hex(number)


@pytest.mark.parametrize(
    ("data", "taken"),
    [
        ({"image/png": IMAGE}, True),
        ({"text/plain": "<Figure>", "image/png": IMAGE, "text/html": IMAGE[::-1]}, True),
        ({"image/png": IMAGE[: LONG - 1]}, False),
        ({"text/plain": IMAGE + "\n"}, False),
        ({"text/plain": IMAGE + "é"}, False),
        ({"application/json": {"image": IMAGE}}, False),
        (IMAGE, False),
        (None, False),
    ],
)
def test_which_texts_are_taken_as_they_are(data: Any, taken: bool) -> None:
    """Long ones in ASCII, of which JSON would escape nothing."""
    assert (with_plain_texts({"data": data}, json_packer) is not None) is taken


def test_a_message_that_is_sent_stays_as_it_was_made() -> None:
    """Who keeps it, a display hook for one, finds its content and not what was sent."""
    session = FrugalSession(key=b"k")
    made = session.msg("display_data", {"data": {"image/png": IMAGE}})
    *_, content = session.serialize(made)
    assert made["content"] == {"data": {"image/png": IMAGE}} == json.loads(content)


def test_another_packer_of_the_user_is_asked() -> None:
    """Its messages are its own."""
    session = FrugalSession(key=b"k")
    session.pack = lambda _: b"of another packer"
    assert session.serialize(message({"data": {"image/png": IMAGE}}))[-1] == b"of another packer"


def test_an_image_arrives_in_the_message_that_its_kernel_signs(start: Callable[..., Any], host: Host) -> None:
    """A display of an image beside text that has to be escaped, from a real kernel."""
    start(fast_iopub=True)
    data = "{'image/png': 'iVBO' * 500_000, 'text/plain': '\"\\n'}"
    code = f"from IPython.display import display\ndisplay({data}, raw=True)"
    messages = host.parsed("iopub", host.execute(code))
    (shown,) = [message for message in messages if message["msg_type"] == "display_data"]
    assert shown["content"]["data"] == {"image/png": "iVBO" * 500_000, "text/plain": '"\n'}
