"""The error table."""

from __future__ import annotations

from http import HTTPStatus

import pytest

from sandbox_gateway.errors import ERRORS, SandboxGatewayError


@pytest.mark.parametrize("code", sorted(ERRORS))
def test_each_row_gives_an_error_a_real_status_a_title_and_a_hint(code: str) -> None:
    row = ERRORS[code]
    error = SandboxGatewayError(code, "it happened")
    assert HTTPStatus(error.status) is HTTPStatus(row.status) and row.status >= 400
    assert row.title and error.hint == row.hint and row.hint.endswith((".", "`"))
    assert str(error).startswith("it happened")


def test_an_unknown_code_cannot_be_raised() -> None:
    with pytest.raises(ValueError, match="unknown error code"):
        SandboxGatewayError("no_such_code", "x")


@pytest.mark.parametrize("code", sorted(ERRORS))
def test_an_error_crosses_a_process_boundary_unchanged(code: str) -> None:
    error = SandboxGatewayError(code, "message", "do this")
    assert SandboxGatewayError.from_dict(error.as_dict()).as_dict() == error.as_dict()


def test_an_error_of_a_newer_program_becomes_internal_and_keeps_its_message() -> None:
    error = SandboxGatewayError.from_dict({"code": "from_the_future", "message": "m"})
    assert (error.code, error.message) == ("internal", "m")
