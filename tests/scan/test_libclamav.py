"""The real library, with a small database: containers, documents, programs, and all that is not clean."""

from __future__ import annotations

import bz2
import ctypes
import gzip
import io
import lzma
import os
import subprocess
import tarfile
import zipfile
from typing import TYPE_CHECKING

import pytest

from fdbroker.scan.engine import EngineError
from fdbroker.scan.engines import libclamav
from fdbroker.scan.engines.libclamav import LibClamAV, LibClamAVOptions
from fdbroker.scan.plugins import configure
from fdbroker.scan.stamps import Databases
from fdbroker.scan.supervisor import Done, Supervisor
from fdbroker.scan.verdict import Clean, Error, Infected, Reason
from tests.sandbox.confined import started_ids
from tests.scan import samples
from tests.scan.clamav import BAD, BAD_NAME, TEST_FILE_NAME, TEST_FILES, make_database
from tests.scan.descriptors import EICAR, EICAR_NAME, make_and_open

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from fdbroker.scan.verdict import Verdict

# Random enough that no pattern of it is left in what was compressed.
PADDING = bytes((number * number * 7 + number) & 0xFF for number in range(5000))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clamav")


@pytest.fixture(scope="module")
def database(directory: Path) -> Path:
    return make_database(directory / "database")


@pytest.fixture(scope="module")
def supervisor(database: Path) -> Iterator[Supervisor]:
    engine = configure("libclamav", {"database": str(database)})
    with Supervisor([engine], ids=started_ids()) as made:
        yield made


@pytest.fixture(scope="module")
def engine(database: Path) -> LibClamAV:
    made = LibClamAV(LibClamAVOptions(bytes(database)))
    made.warm()
    return made


def scan_in_worker(supervisor: Supervisor, directory: Path, files: Mapping[str, bytes]) -> dict[str, Verdict]:
    done: list[Done] = []
    for number, (name, contents) in enumerate(files.items()):
        done += supervisor.submit(name.encode(), make_and_open(directory / f"sample{number}", contents))
    done += supervisor.finish()
    return {one.path.decode(): one.verdict for one in done}


def scan_here(engine: LibClamAV, directory: Path, contents: bytes, scratch: Path) -> Verdict:
    descriptor = make_and_open(directory / "sample", contents)
    try:
        return engine.scan(descriptor, len(contents), bytes(scratch))
    finally:
        os.close(descriptor)


def test_containers_of_the_warm_up_have_the_text_in_them() -> None:
    zipped, tarred, *packed = libclamav._samples()[3:8]
    texts = [zipfile.ZipFile(io.BytesIO(zipped)).read("sample.html")]
    with tarfile.open(fileobj=io.BytesIO(tarred)) as archive:
        member = archive.extractfile("sample.txt")
        assert member is not None
        texts.append(member.read())
    texts += [
        unpack(data)
        for unpack, data in zip((gzip.decompress, bz2.decompress, lzma.decompress), packed, strict=True)
    ]
    assert texts == [libclamav._TEXT] * 5


def reason_of(verdict: Verdict) -> str:
    return verdict.reason if isinstance(verdict, Error) else verdict.verdict


@pytest.mark.parametrize("name", samples.CONTAINERS)
def test_what_is_in_a_container_is_found_by_a_confined_worker(
    name: str, supervisor: Supervisor, tmp_path: Path
) -> None:
    make = samples.CONTAINERS[name]
    bad, fine = make(PADDING + BAD + PADDING), make(PADDING + PADDING)
    verdicts = scan_in_worker(supervisor, tmp_path, {"bad": bad, "fine": fine})
    assert verdicts == {"bad": Infected(BAD_NAME), "fine": Clean()}


def test_seven_zip_is_looked_into(supervisor: Supervisor, tmp_path: Path) -> None:
    made = samples.by_program(tmp_path / "7z", PADDING + BAD, "7z", "a", "{}")
    assert scan_in_worker(supervisor, tmp_path, {"7z": made}) == {"7z": Infected(BAD_NAME)}


def test_real_programs_are_looked_into(supervisor: Supervisor, tmp_path: Path) -> None:
    with open("/bin/true", "rb") as file:
        program = file.read()
    verdicts = scan_in_worker(supervisor, tmp_path, {"fine": program, "bad": program + BAD})
    assert verdicts == {"fine": Clean(), "bad": Infected(BAD_NAME)}


def test_the_test_files_of_clamav_are_all_found_by_a_confined_worker(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in sorted(TEST_FILES.iterdir())}
    assert len(files) > 40
    verdicts = scan_in_worker(supervisor, tmp_path, files)
    assert verdicts == dict.fromkeys(files, Infected(TEST_FILE_NAME))
    assert supervisor.workers_started == 1


def test_several_findings_are_all_named(supervisor: Supervisor, tmp_path: Path) -> None:
    both = samples.tarred(EICAR)[:1024] + samples.tarred(BAD)
    assert scan_in_worker(supervisor, tmp_path, {"eicar": EICAR, "both": both}) == {
        "eicar": Infected(f"{EICAR_NAME}.UNOFFICIAL"),
        "both": Infected(f"{EICAR_NAME}.UNOFFICIAL", (BAD_NAME,)),
    }


def test_what_can_not_be_looked_into_is_an_error_with_its_kind(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    contents = PADDING + BAD
    files = {
        "zip": samples.by_program(tmp_path / "zip", contents, "zip", "-q", "-P", "word", "{}"),
        "zip of AES": samples.by_program(
            tmp_path / "aes", contents, "7z", "a", "-tzip", "-mem=AES256", "-pword", "{}"
        ),
        "7z": samples.by_program(tmp_path / "7z", contents, "7z", "a", "-pword", "{}"),
        "7z with names": samples.by_program(tmp_path / "mhe", contents, "7z", "a", "-pword", "-mhe=on", "{}"),
        "document": samples.ole2("EncryptedPackage", PADDING),
        "zip in zip": samples.zipped(samples.encrypted_in_name_only(PADDING)),
    }
    others = {
        "RAR 4": samples.RAR4,
        "RAR 5": samples.RAR5,
        "RAR in a zip": samples.zipped(samples.RAR5),
        "zstd": samples.ZSTD,
        "zstd in a tar": samples.tarred(samples.ZSTD, "w:gz"),
        "lz4": samples.LZ4,
        "damaged xz": samples.CONTAINERS["xz"](os.urandom(5000))[:1000],
        "damaged zip": samples.zipped(os.urandom(5000))[:1000],
        "zip of LZMA": samples.by_program(tmp_path / "lzma", contents, "7z", "a", "-tzip", "-mm=LZMA", "{}"),
        "zip of PPMd": samples.by_program(tmp_path / "ppmd", contents, "7z", "a", "-tzip", "-mm=PPMd", "{}"),
        "7z of bzip2": samples.by_program(tmp_path / "bzip2", contents, "7z", "a", "-m0=BZip2", "{}"),
        "7z in a zip": samples.zipped(
            samples.by_program(tmp_path / "deflate", contents, "7z", "a", "-m0=Deflate", "{}")
        ),
    }
    others["7z of bzip2, and a file behind it"] = samples.zipped_many([others["7z of bzip2"], PADDING])
    verdicts = scan_in_worker(supervisor, tmp_path, files | others)
    assert {name: reason_of(verdict) for name, verdict in verdicts.items()} == {
        **dict.fromkeys(files, "unscannable_encrypted"),
        **dict.fromkeys(others, "unscannable_container"),
    }


def test_a_finding_beside_what_is_encrypted_is_a_finding(supervisor: Supervisor, tmp_path: Path) -> None:
    (tmp_path / "zip").mkdir()
    (tmp_path / "zip" / "bad").write_bytes(BAD)
    samples.by_program(tmp_path / "zip", PADDING, "zip", "-q", "-P", "word", "{}")
    subprocess.run(["zip", "-q", "archive.zip", "bad"], cwd=tmp_path / "zip", check=True)
    both = (tmp_path / "zip" / "archive.zip").read_bytes()
    assert scan_in_worker(supervisor, tmp_path, {"both": both}) == {"both": Infected(BAD_NAME)}


def test_kinds_that_are_accepted_may_be_clean(database: Path, tmp_path: Path) -> None:
    accept = ["encrypted", "rar", "zstd", "damaged"]
    engine = configure("libclamav", {"database": str(database), "accept": accept})
    files = {
        "zip": samples.encrypted_in_name_only(PADDING),
        "document": samples.ole2("EncryptedPackage", PADDING),
        "RAR": samples.RAR5,
        "zstd": samples.ZSTD,
        "damaged": samples.CONTAINERS["xz"](os.urandom(5000))[:1000],
        "lz4": samples.LZ4,
    }
    with Supervisor([engine], ids=started_ids()) as supervisor:
        verdicts = scan_in_worker(supervisor, tmp_path, files)
    assert {name for name, verdict in verdicts.items() if isinstance(verdict, Clean)} == files.keys() - {
        "lz4"
    }
    assert reason_of(verdicts["lz4"]) == "unscannable_container"


def test_over_a_limit_nothing_is_clean(database: Path, tmp_path: Path) -> None:
    limits = {
        "database": str(database),
        "max_file_size": "1MiB",
        "max_scan_size": "3MiB",
        "max_recursion": 5,
        "max_files": 20,
    }
    many = samples.tarred(b"x" * 100)[:1024] * 30 + bytes(1024)
    large = bytes((1 << 20) + 1) + BAD
    files = {
        "a large file": bytes((1 << 20) + 1),
        "a large part of a zip": samples.zipped(large),
        "a large part that says it is small": samples.zipped_with_a_wrong_size(large, 10),
        "a large part of a gz": samples.CONTAINERS["gz"](large),
        "a large part of a 7z": samples.by_program(tmp_path / "7z", large, "7z", "a", "{}"),
        "deeply nested": samples.nested(PADDING, 8),
        "many parts": many,
        "much in all": samples.CONTAINERS["gz"](samples.zipped_many([bytes(900_000)] * 6)),
        "a bomb": samples.bomb(),
    }
    with Supervisor([configure("libclamav", limits)], ids=started_ids()) as supervisor:
        verdicts = scan_in_worker(supervisor, tmp_path, files)
        assert supervisor.workers_started == 1
    assert {name: reason_of(verdict) for name, verdict in verdicts.items()} == {
        **dict.fromkeys(files, "limit_exceeded"),
        "a large file": "too_large",
    }


def test_a_bomb_is_an_error_in_time(database: Path, tmp_path: Path) -> None:
    engine = configure("libclamav", {"database": str(database), "max_scan_time": 0.2})
    with Supervisor([engine], ids=started_ids(), timeout=60) as supervisor:
        verdicts = scan_in_worker(supervisor, tmp_path, {"bomb": samples.bomb(), "fine": PADDING})
    assert verdicts == {
        "bomb": Error(Reason.LIMIT_EXCEEDED, "libclamav: MaxScanTime"),
        "fine": Clean(),
    }


@pytest.mark.root
@pytest.mark.parametrize("name", ["zip", "gz", "bz2", "xz", "tar.gz", "mail"])
def test_what_has_no_room_in_the_scratch_directory_is_an_error(
    name: str, engine: LibClamAV, tmp_path: Path
) -> None:
    contents = samples.CONTAINERS[name](os.urandom(300_000) + BAD)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", scratch], check=True)
    try:
        full = scan_here(engine, tmp_path, contents, scratch)
        assert reason_of(full) == "scratch_full"
        assert os.listdir(scratch) == []
    finally:
        subprocess.run(["umount", scratch], check=True)
    assert scan_here(engine, tmp_path, contents, scratch) == Infected(BAD_NAME)


def test_the_room_that_is_asked_for_holds_all_that_one_file_may_unpack(engine: LibClamAV) -> None:
    needs = engine.needs()
    assert needs.profile == "scratch"
    assert needs.scratch_size >= 2 * engine.options.max_scan_size + engine.options.max_file_size


def test_what_a_scan_left_behind_is_gone_before_the_next_one(engine: LibClamAV, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    (scratch / "left" / "deep").mkdir(parents=True)
    (scratch / "left" / "deep" / "file").write_bytes(b"x")
    (scratch / "left" / "link").symlink_to(tmp_path)
    assert scan_here(engine, tmp_path, PADDING, scratch) == Clean()
    assert os.listdir(scratch) == []
    assert (tmp_path / "sample").exists()


def test_without_a_scratch_directory_nothing_is_scanned(engine: LibClamAV, tmp_path: Path) -> None:
    descriptor = make_and_open(tmp_path / "file")
    verdict = engine.scan(descriptor, 11, None)
    os.close(descriptor)
    assert reason_of(verdict) == "not_loaded"
    fresh = LibClamAV(LibClamAVOptions())
    assert reason_of(fresh.scan(0, 0, b"/tmp")) == "not_loaded"
    with pytest.raises(EngineError, match="not loaded"):
        fresh.version()


def test_its_version_is_that_of_clamd(engine: LibClamAV) -> None:
    said = engine.version()
    assert said.startswith("ClamAV 1.4.")
    assert said.endswith("/0/local, 3 signatures")


@pytest.mark.parametrize("contents", [None, "", "no signature at all\n"])
def test_a_database_without_signatures_is_an_error(contents: str | None, tmp_path: Path) -> None:
    if contents is not None:
        (tmp_path / "database").mkdir()
        (tmp_path / "database" / "some.hdb").write_text(contents)
    engine = LibClamAV(LibClamAVOptions(bytes(tmp_path / "database")))
    with pytest.raises(EngineError, match="database" if contents is not None else "freshclam gets one"):
        engine.warm()


def test_a_library_that_is_not_there_is_an_error_with_the_cure() -> None:
    engine = LibClamAV(LibClamAVOptions(library="libclamav.so.0"))
    with pytest.raises(EngineError, match="apt-get install libclamav12"):
        engine.warm()


def test_a_database_that_changes_is_noticed(directory: Path, tmp_path: Path) -> None:
    database = make_database(tmp_path / "database")
    engine = LibClamAV(LibClamAVOptions(bytes(database)))
    more = database / "more.hdb"
    other = tmp_path / "other"
    other.write_text("xy")
    changes: list[Callable[[], object]] = [
        lambda: more.write_text("x"),
        lambda: more.write_text("xy"),
        lambda: os.utime(more, (1, 1)),
        lambda: other.rename(more),
        more.unlink,
    ]
    for change in changes:
        seen = Databases([engine])
        assert not seen.changed()
        change()
        assert seen.changed()


def test_a_signature_that_was_added_is_found_without_a_file_being_missed(tmp_path: Path) -> None:
    database = make_database(tmp_path / "database")
    engine = configure("libclamav", {"database": str(database)})
    with Supervisor([engine], ids=started_ids()) as supervisor:
        assert scan_in_worker(supervisor, tmp_path, {"new": b"a new marker"}) == {"new": Clean()}
        (database / "more.ndb").write_text(f"New-Marker:0:*:{b'new marker'.hex()}\n")
        assert supervisor.outdated()
        done = list(supervisor.submit(b"file", make_and_open(tmp_path / "file", b"a new marker")))
        supervisor.renew()
        done += supervisor.finish()
        assert [one.verdict for one in done] == [Infected("New-Marker.UNOFFICIAL")]


def test_the_return_codes_are_those_of_the_library() -> None:
    library = ctypes.CDLL("libclamav.so.12")
    library.cl_strerror.restype = ctypes.c_char_p
    texts = {code: library.cl_strerror(code).decode() for code in libclamav._REASONS}
    assert {texts[code] for code, reason in libclamav._REASONS.items() if reason is Reason.MEMORY} == {
        "Can't allocate memory"
    }
    assert texts[14] == "Can't write to file"
    assert texts[21] == "Exceeded time limit"
    assert "unknown" not in " ".join(texts.values()).lower()


@pytest.mark.parametrize(
    ("status", "names", "messages", "reason"),
    [
        (0, [], [], None),
        (20, [], [], Reason.MEMORY),
        (34, [], [], Reason.ENGINE_FAILED),
        (99, [], [], Reason.ENGINE_FAILED),
        (1, [], [], Reason.UNKNOWN_ANSWER),
        (0, [], ["cli_writen: write error: No space left on device"], Reason.SCRATCH_FULL),
        (0, [], ["cli_malloc(): Can't allocate memory (9 bytes)."], Reason.MEMORY),
        (0, [], ["something nobody has seen yet"], Reason.UNSCANNABLE_CONTAINER),
        (1, ["Heuristics.Limits.Exceeded.MaxFiles"], [], Reason.LIMIT_EXCEEDED),
        (1, ["Heuristics.Encrypted.PDF"], [], Reason.UNSCANNABLE_ENCRYPTED),
        (1, ["Fdbroker.Unscannable.ace.UNOFFICIAL"], [], Reason.UNSCANNABLE_CONTAINER),
    ],
)
def test_each_answer_of_the_library_has_its_verdict(
    status: int, names: list[str], messages: list[str], reason: Reason | None, engine: LibClamAV
) -> None:
    verdict = engine._verdict(status, names, messages)
    assert (verdict.reason if isinstance(verdict, Error) else None) is reason
    assert isinstance(verdict, Clean) == (reason is None)
