"""Every reason has its class, its text and its way across processes."""

from __future__ import annotations

import copy
import errno
import pickle

import pytest

from fdbroker.client import errors
from fdbroker.client.errors import (
    BrokerError,
    error_of_reply,
    error_of_result,
    error_of_serving,
    error_of_walk,
)
from fdbroker.wire.format import ERRNO_OF, Kind, Limit, Reason
from fdbroker.wire.messages import ErrorReply, LimitReached, broken, limited, refused

EXPECTED: dict[Reason, type[OSError]] = {
    Reason.DENIED: PermissionError,
    Reason.PATH_INVALID: OSError,
    Reason.NOT_FOUND: FileNotFoundError,
    Reason.NOT_DIRECTORY: NotADirectoryError,
    Reason.NOT_REGULAR: OSError,
    Reason.SYMLINK: OSError,
    Reason.CROSSES_MOUNT: OSError,
    Reason.MOUNT_NOT_READ_ONLY: OSError,
    Reason.FILESYSTEM: OSError,
    Reason.BUSY: BlockingIOError,
    Reason.IDENTITY: PermissionError,
    Reason.LIMIT: BlockingIOError,
    Reason.AUDIT: OSError,
    Reason.BROKEN: OSError,
    Reason.MALFORMED: ConnectionError,
    Reason.VERSION: ConnectionError,
    Reason.POLICY: errors.ReloadRefusedError,
    Reason.TOO_LARGE: OSError,
    Reason.TIMED_OUT: TimeoutError,
}
CLASSES = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, BrokerError)]


@pytest.mark.parametrize("reason", EXPECTED)
def test_each_reason_has_a_class_and_a_text_of_its_own(reason: Reason) -> None:
    error = error_of_result(refused(reason), b"/some/path", 7)
    assert isinstance(error, EXPECTED[reason])
    assert error.errno == ERRNO_OF[reason]
    assert (error.reason, error.filename, error.request_id) == (reason, b"/some/path", 7)
    assert "/some/path" in str(error)
    texts = [error_of_result(refused(one), b"/some/path", 7).strerror for one in EXPECTED]
    assert texts.count(error.strerror) == 1


def test_what_is_said_of_a_listener_is_not_about_a_file() -> None:
    denied = error_of_serving(refused(Reason.DENIED), b"clamd", 7)
    assert isinstance(denied, PermissionError)
    assert (denied.reason, denied.filename) == (Reason.DENIED, b"clamd")
    assert "listeners: {NAME: {service: ...}}" in str(denied)
    assert "serves the listener already" in str(error_of_serving(refused(Reason.BUSY), b"clamd", 7))
    # The others mean the same of both.
    audit = error_of_serving(refused(Reason.AUDIT), b"clamd", 7)
    assert audit.strerror == error_of_result(refused(Reason.AUDIT), b"clamd", 7).strerror


def test_a_walk_with_globs_that_is_invalid_may_be_so_for_a_glob() -> None:
    invalid = refused(Reason.PATH_INVALID)
    with_globs = error_of_walk(invalid, b"/srv", 7, has_globs=True)
    assert isinstance(with_globs, errors.PathInvalidError)
    assert "a glob is none" in str(with_globs)
    assert "glob" not in str(error_of_walk(invalid, b"/srv", 7, has_globs=False))
    denied = error_of_walk(refused(Reason.DENIED), b"/srv", 7, has_globs=True)
    assert denied.strerror == error_of_result(refused(Reason.DENIED), b"/srv", 7).strerror


@pytest.mark.parametrize("limit", Limit)
@pytest.mark.parametrize("retry_after", [0, 250])
def test_a_limit_is_told_with_its_value_and_when_to_try_again(limit: Limit, retry_after: int) -> None:
    reached = LimitReached(limit, 1000, retry_after)
    of_result = error_of_result(limited(reached), b"/some/path", 7)
    of_frame = error_of_reply(
        ErrorReply(7, 1, Kind.REFUSED, Reason.LIMIT, errno.EAGAIN, "slower", reached), b"/some/path"
    )
    for error in (of_result, of_frame, pickle.loads(pickle.dumps(of_result))):  # noqa: S301 - our own
        assert isinstance(error, errors.LimitError)
        assert isinstance(error, BlockingIOError)
        assert (error.limit, error.value) == (limit.name.lower(), 1000)
        assert error.retry_after == (0.25 if retry_after else None)
        assert (error.errno, error.reason, error.filename, error.request_id) == (
            errno.EAGAIN,
            Reason.LIMIT,
            b"/some/path",
            7,
        )
        assert f"{limit.name.lower()} is reached, which is 1000; " in str(error)
        assert ("try again in 0.25 s" in str(error)) is bool(retry_after)


def test_a_limit_that_the_broker_does_not_name_is_an_error_without_it() -> None:
    error = error_of_result(refused(Reason.LIMIT), b"/some/path", 7)
    assert isinstance(error, errors.LimitError)
    assert (error.limit, error.value, error.retry_after) == (None, None, None)


def test_all_reasons_are_covered() -> None:
    assert EXPECTED.keys() == set(Reason) - {Reason.NONE}


def test_only_a_directory_is_a_directory() -> None:
    directory = error_of_result(refused(Reason.NOT_REGULAR, errno.EISDIR), b"/d", 1)
    assert isinstance(directory, IsADirectoryError)
    assert isinstance(directory, errors.NotRegularError)
    assert not isinstance(error_of_result(refused(Reason.NOT_REGULAR), b"/fifo", 1), IsADirectoryError)


def test_a_failure_of_the_broker_is_never_taken_for_a_verdict_about_the_file() -> None:
    for number in (errno.ENOENT, errno.EACCES, errno.ENOMEM, 9999):
        error = error_of_result(broken(number), b"/a", 1)
        assert type(error) is errors.BrokenError
        assert error.errno == number
    nameless = error_of_result(refused(Reason.NONE), b"/a", 1)
    assert type(nameless) is errors.BrokenError
    assert nameless.errno == errno.EIO


def test_an_error_frame_is_quoted() -> None:
    error = error_of_reply(ErrorReply(3, 1, Kind.REFUSED, Reason.LIMIT, 11, "too many connections"))
    assert isinstance(error, errors.LimitError)
    assert "too many connections" in str(error)
    assert error.filename is None


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_survives_copying_and_pickling(kind: type[BrokerError]) -> None:
    error = kind(errno.EACCES, "text", b"/path", Reason.DENIED, 7)
    for same in (copy.copy(error), pickle.loads(pickle.dumps(error))):  # noqa: S301 - our own
        assert type(same) is kind
        assert same.args == error.args
        assert (same.errno, same.strerror, same.filename) == (errno.EACCES, "text", b"/path")
        assert (same.reason, same.request_id) == (Reason.DENIED, 7)
        assert str(same) == str(error)


def test_no_error_about_the_connection_is_taken_for_one_about_the_file() -> None:
    about_files = (PermissionError, FileNotFoundError, IsADirectoryError, NotADirectoryError)
    for kind in (errors.UnavailableError, errors.DisconnectedError, errors.ProtocolError):
        assert issubclass(kind, ConnectionError)
        assert not issubclass(kind, about_files)


def test_an_audit_without_room_is_told_once_and_in_the_brokers_words_where_it_has_some() -> None:
    said = "it could not be recorded, so nothing was done: free the audit's disk, or see to who reads it"
    told = error_of_reply(ErrorReply(3, 1, Kind.REFUSED, Reason.AUDIT, 5, said))
    assert isinstance(told, errors.BrokenError)
    assert told.strerror == said
    untold = error_of_reply(ErrorReply(3, 1, Kind.REFUSED, Reason.AUDIT, 5, ""))
    assert str(untold.strerror).startswith("the broker could not record its decision, so it gave nothing;")
