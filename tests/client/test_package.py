"""What `import fdbroker` gives, and what it costs the broker's process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fdbroker
from fdbroker import client


def test_every_public_name_is_there() -> None:
    for name in fdbroker.__all__:
        assert getattr(fdbroker, name) is not None
    assert set(fdbroker.__all__) <= set(dir(fdbroker))
    assert fdbroker.connect is client.connect


def test_the_client_exports_what_the_package_does() -> None:
    assert set(fdbroker.__all__) - {"__version__"} <= set(client.__all__)
    for name in client.__all__:
        assert getattr(client, name) is not None


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fdbroker.nothing


def test_importing_the_package_imports_nothing_else() -> None:
    program = (
        "import sys; before = set(sys.modules); import fdbroker; print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "['__future__', 'fdbroker']"


def test_the_version_is_that_of_the_installed_package() -> None:
    assert isinstance(fdbroker.__version__, str)
    assert fdbroker.__version__[0].isdigit()


def test_the_client_imports_no_asyncio_and_nothing_of_the_broker() -> None:
    program = "import sys, fdbroker.client; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"asyncio", "subprocess", "tempfile", "hashlib", "ctypes"}
    ours = {name for name in loaded if name.startswith("fdbroker.")}
    assert all(name.split(".")[1] in {"client", "wire", "kernel"} for name in ours)


def test_a_worker_that_decodes_replies_loads_no_typing() -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "import fdbroker.wire.client, fdbroker.kernel.descriptors; print('\\n'.join(sys.modules))"
    )
    sources = str(Path(fdbroker.__file__).parents[1])
    command = [sys.executable, "-I", "-S", "-c", program, sources]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert not {"typing", "re", "dataclasses"} & set(done.stdout.split())


def test_the_asyncio_client_is_a_module_of_the_package() -> None:
    program = "import fdbroker.aio; print(fdbroker.aio.connect.__name__)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "connect"


def test_the_sources_are_typed() -> None:
    assert (Path(fdbroker.__file__).parent / "py.typed").exists()
