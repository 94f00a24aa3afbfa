"""The model itself: each way in which a stream of messages can be wrong must be found, and nothing else."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from model import KernelModel, Request, payload_hashes

_numbers = itertools.count()


def message(kind: str, parent: str, msg_id: str | None = None, **content: Any) -> dict[str, Any]:
    """A message as a client reads it."""
    header = {"msg_id": msg_id or f"m{next(_numbers)}", "msg_type": kind}
    return {"header": header, "parent_header": {"msg_id": parent}, "metadata": {}, "content": content}


def status(parent: str, state: str) -> tuple[str, dict[str, Any]]:
    return "iopub", message("status", parent, execution_state=state)


def line(parent: str, text: str, msg_id: str | None = None) -> tuple[str, dict[str, Any]]:
    return "iopub", message("stream", parent, msg_id, name="stdout", text=text)


def begin(parent: str, count: int) -> tuple[str, dict[str, Any]]:
    return "iopub", message("execute_input", parent, code="", execution_count=count)


def reply(parent: str, count: int, state: str = "ok") -> tuple[str, dict[str, Any]]:
    return "shell", message("execute_reply", parent, status=state, execution_count=count, ename="")


def whole(parent: str = "a", count: int = 1, lines: int = 4) -> list[tuple[str, dict[str, Any]]]:
    """All messages of a cell that prints ``lines`` lines."""
    return [
        status(parent, "busy"),
        begin(parent, count),
        *(line(parent, f"{parent}:{number}\n") for number in range(lines)),
        reply(parent, count),
        status(parent, "idle"),
    ]


def fed(stream: list[tuple[str, dict[str, Any]]], *requests: Request) -> KernelModel:
    model = KernelModel()
    for request in requests or (Request("a", "a", lines=4),):
        model.sent(request)
    for channel, content in stream:
        model.received(channel, content)
    model.check_end()
    return model


def kinds(model: KernelModel) -> set[str]:
    return {failure.kind for failure in model.failures}


def test_a_stream_without_fault_is_accepted() -> None:
    model = fed(whole())
    assert model.failures == []
    assert (model.lines, model.count) == (4, 1)


def test_lines_may_come_in_any_pieces() -> None:
    text = "".join(f"a:{number}\n" for number in range(4))
    stream = whole()
    stream[2:6] = [line("a", text[:1]), line("a", text[1:6]), line("a", text[6:])]
    assert fed(stream).failures == []


def test_two_cells_one_after_the_other_are_accepted() -> None:
    model = fed(whole("a", 1) + whole("b", 2), Request("a", "a", lines=4), Request("b", "b", lines=4))
    assert model.failures == []


@pytest.mark.parametrize("index", [2, 3, 4, 5])
def test_a_lost_line_is_found_wherever_it_was(index: int) -> None:
    stream = whole()
    del stream[index]
    assert kinds(fed(stream)) == {"lost_line"}


@pytest.mark.parametrize(
    ("index", "found"),
    [
        (0, "before_busy"),
        (1, "lost_begin"),
        (6, "unfinished"),
        (7, "unfinished"),
    ],
)
def test_any_other_lost_message_is_found(index: int, found: str) -> None:
    stream = whole()
    del stream[index]
    assert found in kinds(fed(stream))


def test_a_doubled_line_is_found() -> None:
    stream = whole()
    stream.insert(4, line("a", "a:1\n"))
    assert kinds(fed(stream)) == {"doubled_line"}


@pytest.mark.parametrize("index", range(8))
def test_a_message_that_comes_twice_is_found(index: int) -> None:
    stream = whole()
    stream.insert(index + 1, stream[index])
    assert kinds(fed(stream)) == {"doubled_message"}


def test_swapped_lines_are_found() -> None:
    stream = whole()
    stream[3], stream[4] = stream[4], stream[3]
    assert kinds(fed(stream)) == {"lost_line", "doubled_line"}


def test_a_line_too_many_is_found() -> None:
    stream = whole(lines=5)
    assert "lost_line" in kinds(fed(stream))


def test_a_line_of_another_cell_is_found() -> None:
    stream = whole("a", 1) + whole("b", 2)
    stream.insert(10, line("b", "a:3\n"))
    model = fed(stream, Request("a", "a", lines=4), Request("b", "b", lines=4))
    assert kinds(model) == {"wrong_line"}


def test_text_after_the_last_line_is_found() -> None:
    stream = whole()
    stream.insert(6, line("a", "a:"))
    assert kinds(fed(stream)) == {"wrong_line"}


@pytest.mark.parametrize(("count", "told"), [(2, 2), (1, 2), (0, 1)])
def test_a_wrong_execution_count_is_found(count: int, told: int) -> None:
    stream = whole(count=count)
    stream[6] = reply("a", told)
    assert kinds(fed(stream)) == {"wrong_count"}


def test_a_doubled_reply_idle_and_busy_are_found() -> None:
    assert kinds(fed([*whole(), reply("a", 1)])) == {"doubled_reply"}
    assert "doubled_idle" in kinds(fed([*whole(), status("a", "idle")]))
    assert kinds(fed([status("a", "busy"), *whole()])) == {"doubled_busy"}


def test_output_after_the_idle_status_is_found() -> None:
    stream = whole()
    stream[5], stream[7] = stream[7], stream[5]
    assert "after_idle" in kinds(fed(stream))


def test_an_error_nobody_asked_for_is_found() -> None:
    stream = whole()
    stream.insert(6, ("iopub", message("error", "a", ename="KeyboardInterrupt", evalue="", traceback=[])))
    stream[7] = reply("a", 1, "error")
    assert kinds(fed(stream)) == {"unexpected_error"}


def test_an_interrupted_cell_may_end_early_but_not_with_a_hole() -> None:
    stream = [
        *whole()[:4],
        ("iopub", message("error", "a", ename="KeyboardInterrupt", evalue="", traceback=[])),
        reply("a", 1, "error"),
        status("a", "idle"),
    ]
    assert fed(stream, Request("a", "a", lines=9, cut=True)).failures == []
    del stream[2]
    assert kinds(fed(stream, Request("a", "a", lines=9, cut=True))) == {"lost_line"}


def test_wrong_values_are_found() -> None:
    stream = [status("a", "busy"), begin("a", 1), line("a", "counter 6\n"), reply("a", 1), status("a", "idle")]
    assert fed(stream, Request("a", "a", values=("counter 6",))).failures == []
    assert "wrong_line" in kinds(fed(stream, Request("a", "a", values=("counter 7",))))
    assert kinds(fed(stream, Request("a", "a", values=("counter 6", "more")))) == {"lost_line"}


def test_displays_are_compared_by_their_content_and_order() -> None:
    def shown(*texts: str) -> list[tuple[str, dict[str, Any]]]:
        pictures = [("iopub", message("display_data", "a", data={"text/plain": text})) for text in texts]
        return [status("a", "busy"), begin("a", 1), *pictures, reply("a", 1), status("a", "idle")]

    wanted = payload_hashes(["x" * 1000, "y" * 1000])
    assert fed(shown("x" * 1000, "y" * 1000), Request("a", "a", displays=wanted)).failures == []
    assert kinds(fed(shown("x" * 1000), Request("a", "a", displays=wanted))) == {"lost_display"}
    assert kinds(fed(shown("y" * 1000, "x" * 1000), Request("a", "a", displays=wanted))) == {"wrong_display"}
    assert kinds(fed(shown("x" * 999, "y" * 1000), Request("a", "a", displays=wanted))) == {"wrong_display"}


def test_an_input_request_is_expected_once_and_with_its_prompt() -> None:
    asked = ("stdin", message("input_request", "a", prompt="a?", password=False))
    stream = [status("a", "busy"), begin("a", 1), asked, reply("a", 1), status("a", "idle")]
    assert fed(stream, Request("a", "a", prompt="a?")).failures == []
    assert kinds(fed(stream, Request("a", "a"))) == {"wrong_input"}
    again = ("stdin", message("input_request", "a", prompt="a?", password=False))
    assert kinds(fed([*stream[:3], again, *stream[3:]], Request("a", "a", prompt="a?"))) == {"wrong_input"}


def test_after_the_owner_was_killed_the_same_message_may_come_again() -> None:
    stream = whole()
    model = KernelModel()
    model.sent(Request("a", "a", lines=4))
    for channel, content in stream[:5]:
        model.received(channel, content)
    model.crash()
    for channel, content in stream[2:]:
        model.received(channel, content)
    model.recovered()
    model.check_end()
    assert model.failures == []
    assert model.repeats == 3
    assert kinds(model) == set()


def test_what_came_first_from_the_new_owner_may_not_come_again() -> None:
    stream = whole()
    model = KernelModel()
    model.sent(Request("a", "a", lines=4))
    model.crash()
    model.recovered()
    for channel, content in [*stream[:5], stream[4]]:
        model.received(channel, content)
    assert kinds(model) == {"doubled_message"}


def test_after_the_owner_was_killed_a_line_under_another_id_is_doubled_and_a_second_repetition_too() -> None:
    stream = whole()
    model = KernelModel()
    model.sent(Request("a", "a", lines=4))
    for channel, content in stream[:5]:
        model.received(channel, content)
    model.crash()
    model.recovered()
    model.received(*line("a", "a:2\n"))
    assert kinds(model) == {"doubled_line"}
    model.failures.clear()
    for channel, content in (stream[5], stream[5]):
        model.received(channel, content)
    assert kinds(model) == {"doubled_message"}


def test_a_request_that_went_down_with_its_owner_is_told_from_one_that_was_lost() -> None:
    for crashes, found in ((1, set()), (0, {"lost_request"})):
        model = KernelModel()
        model.sent(Request("a", "a", lines=4))
        probe = model.sent(Request("b", "b"))
        for _ in range(crashes):
            model.crash()
        for channel, content in (status("b", "busy"), begin("b", 1), reply("b", 1), status("b", "idle")):
            model.received(channel, content)
        assert [request.tag for request in model.settle(probe)] == ["a"]
        model.check_end()
        assert kinds(model) == found


def test_output_that_was_left_out_is_a_failure() -> None:
    notice = "[sandbox] 3 messages of output (900 bytes) were left out: they came faster than they were read\n"
    stream = whole()
    stream.insert(4, ("iopub", message("stream", "a", name="stderr", text=notice)))
    assert kinds(fed(stream)) == {"left_out"}


def test_a_restart_ends_what_ran_and_counts_from_one() -> None:
    model = KernelModel()
    model.sent(Request("a", "a", lines=4))
    for channel, content in whole()[:4]:
        model.received(channel, content)
    model.restarted()
    model.sent(Request("b", "b", lines=4))
    for channel, content in whole("b", 1):
        model.received(channel, content)
    model.check_end()
    assert model.failures == []


def test_a_childs_share_of_a_cell_is_the_rest_without_a_hole() -> None:
    def share(*numbers: int) -> KernelModel:
        stream = [
            *(line("a", f"a:{number}\n") for number in numbers),
            status("a", "idle"),
        ]
        request = Request("a", "a", lines=9, first=None, inherited=True)
        request.busy, request.count = 1, 1
        return fed(stream, request)

    assert share(6, 7, 8).failures == []
    assert kinds(share(6, 8)) == {"lost_line"}
    assert kinds(share(5, 6, 7)) == {"lost_line"}
    stream = [line("a", "\na:7\n"), line("a", "a:8\n"), status("a", "idle")]
    request = Request("a", "a", lines=9, first=None, inherited=True, busy=1, count=1)
    assert fed(stream, request).failures == [], "the rest of a line"
    assert share().failures == [], "it may have printed all of it before the fork"
