"""The project keeps its own rules: who imports what, what is depended on, what is shipped."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import BytesParser
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "fdbroker"
PYPROJECT = ROOT / "pyproject.toml"

# Folder -> the folders of fdbroker that it may import from.
MAY_IMPORT = {
    "kernel": {"kernel"},
    "wire": {"wire"},
    "policy": {"policy"},
    "broker": {"broker", "policy", "wire", "kernel"},
    "client": {"client", "wire", "kernel"},
    "aio": {"aio", "client", "wire"},
}
TRUSTED = ["kernel", "wire", "policy", "broker"]

# Of the standard library, what the process with the capability does without, and why.
UNWANTED = {
    "asyncio": "one epoll loop is enough",
    "hashlib": "maps libcrypto",
    "hmac": "maps libcrypto",
    "marshal": "runs what it reads",
    "multiprocessing": "pickles",
    "pickle": "runs what it reads",
    "random": "imports hashlib",
    "secrets": "imports hmac",
    "shelve": "pickles",
    "ssl": "maps libssl",
    "subprocess": "the broker starts nothing",
    "tempfile": "imports random; the broker writes no file",
    "uuid": "imports what it finds",
}


def configuration() -> dict[str, Any]:
    """Return what pyproject.toml says."""
    return tomllib.loads(PYPROJECT.read_text())


def sources(folder: str) -> list[Path]:
    return sorted((SOURCE / folder).rglob("*.py"))


def imports(path: Path) -> list[tuple[int, str]]:
    """Return line and full name of each thing that a source file imports, wherever in it."""
    package = ("fdbroker", *path.relative_to(SOURCE).parent.parts)
    found = []
    for node in ast.walk(ast.parse(path.read_bytes(), path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return found


def objections(folder: str, path: Path) -> list[str]:
    """Return what is wrong with the imports of a file in a folder that is held to the standard library."""
    wrong = []
    for line, name in imports(path):
        top, _, rest = name.partition(".")
        below = rest.partition(".")[0]
        reason = ""
        if top == "fdbroker":
            if below not in MAY_IMPORT[folder]:
                reason = f"{folder} may import {sorted(MAY_IMPORT[folder])}"
        elif top not in sys.stdlib_module_names:
            reason = "not in the standard library"
        elif folder in TRUSTED and top in UNWANTED:
            reason = UNWANTED[top]
        elif folder in TRUSTED and top in {"ctypes", "_ctypes"} and folder != "kernel":
            reason = "system calls are wrapped in kernel"
        if reason:
            wrong.append(f"{path.relative_to(ROOT)}:{line}: {name}: {reason}")
    return wrong


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folder_imports_the_standard_library_and_what_is_below_it(folder: str) -> None:
    wrong = [line for path in sources(folder) for line in objections(folder, path)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", TRUSTED)
def test_trusted_folder_runs_no_text_as_code(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.func.id}"
        for path in sources(folder)
        for node in ast.walk(ast.parse(path.read_bytes(), path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in {"__import__", "compile", "eval", "exec"}
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("folder", "statement"),
    [
        ("kernel", "import yaml"),
        ("kernel", "import systemd.journal"),
        ("kernel", "from fdbroker.wire import frames"),
        ("kernel", "from .. import wire"),
        ("kernel", "import fdbroker"),
        ("wire", "from fdbroker.kernel.libc import syscall"),
        ("wire", "from ..policy.decide import decide"),
        ("policy", "import ctypes"),
        ("policy", "def f():\n    import pickle"),
        ("broker", "from fdbroker.config import load"),
        ("broker", "from fdbroker import client"),
        ("broker", "if TYPE_CHECKING:\n    from fdbroker.launcher import start"),
        ("client", "from fdbroker.policy.decide import decide"),
        ("client", "import yaml"),
    ],
)
def test_a_wrong_import_would_be_seen(
    folder: str, statement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / folder).mkdir()
    path = tmp_path / folder / "module.py"
    path.write_text(statement)
    assert objections(folder, path)


def test_a_right_import_is_not_objected_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    (tmp_path / "broker").mkdir()
    path = tmp_path / "broker" / "module.py"
    path.write_text(
        "from __future__ import annotations\nimport os.path, socket\nfrom fdbroker.kernel import peer\n"
        "from . import loop\nfrom .loop import run\nfrom ..policy.decide import decide\n"
    )
    assert objections("broker", path) == []


def test_base_package_depends_on_nothing_and_extras_are_the_documented_ones() -> None:
    project = configuration()["project"]
    assert project["dependencies"] == []
    extras = {
        extra: {re.split(r"[\[<>=!~]", requirement)[0] for requirement in requirements}
        for extra, requirements in project["optional-dependencies"].items()
    }
    assert extras.keys() == {"daemon", "cli", "metrics", "yara", "dev", "bench", "docs", "fuzz"}
    assert extras["daemon"] == {"pyyaml", "python-daemon", "systemd-python"}
    assert extras["cli"] == {"click", "rich"}
    assert extras["metrics"] == {"prometheus-client"}
    assert extras["yara"] == {"yara-x"}


def test_each_dependency_has_a_lower_bound_and_its_exact_version_is_pinned() -> None:
    pins = {
        re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    for requirements in configuration()["project"]["optional-dependencies"].values():
        for requirement in requirements:
            name, bound, _ = requirement.partition(">=")
            assert bound, requirement
            assert re.sub(r"[-_.]+", "-", name.partition("[")[0]).lower() in pins


def test_each_exception_from_the_style_rules_has_its_reason_beside_it() -> None:
    lint = configuration()["tool"]["ruff"]["lint"]
    assert lint["select"] == ["ALL"]
    listed = [*lint["ignore"], *(code for codes in lint["per-file-ignores"].values() for code in codes)]
    text = PYPROJECT.read_text()
    section = text[text.index("[tool.ruff.lint]") : text.index("[tool.ruff.lint.pydocstyle]")]
    with_reason = re.findall(r'^ +"([A-Z]+[0-9]*)", +# \S.*$', section, re.MULTILINE)
    assert sorted(with_reason) == sorted(listed)


def test_each_inline_exception_names_its_rule() -> None:
    bare = re.compile(r"#\s*(noqa(?!:\s*[A-Z])|type:\s*ignore(?!\[))")
    wrong = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted(SOURCE.rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if bare.search(line)
    ]
    assert not wrong


def test_wheel_has_types_and_licence_and_only_the_package(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-I", "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    [built] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as wheel:
        names = wheel.namelist()
        [metadata_name] = [name for name in names if name.endswith(".dist-info/METADATA")]
        metadata = BytesParser().parsebytes(wheel.read(metadata_name))
    assert "fdbroker/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"fdbroker"}
    shells = {
        "bash": "bash-completion/completions",
        "fish": "fish/vendor_completions.d",
        "zsh": "zsh/site-functions",
    }
    for shell, place in shells.items():
        for path in (ROOT / "packaging" / "completions" / shell).iterdir():
            assert any(name.endswith(f".data/data/share/{place}/{path.name}") for name in names)
    # Nothing in the sources is left behind by an ignore pattern.
    kept = {f"fdbroker/{path.relative_to(SOURCE)}" for path in SOURCE.rglob("*.py")}
    assert kept <= set(names)
    assert metadata["Version"] == configuration()["project"]["version"]
    assert all("extra ==" in line for line in metadata.get_all("Requires-Dist", []))


def test_whoever_makes_it_has_one_name_wherever_it_is_said() -> None:
    [author] = configuration()["project"]["authors"]
    said = {
        "docs/site/conf.py": r'^author = "(.*)"$',
        "packaging/debian/changelog": r"^ -- (.*) <.*",
        "packaging/debian/control": r"^Maintainer: (.*) <.*>$",
        "packaging/debian/copyright": r"^Copyright: \d+ (.*)$",
    }
    for file, pattern in said.items():
        assert set(re.findall(pattern, (ROOT / file).read_text(), re.MULTILINE)) == {author["name"]}, file


def test_debian_packages_have_the_version_of_the_project() -> None:
    changelog = (ROOT / "packaging" / "debian" / "changelog").read_text()
    [first] = re.findall(r"\Afdbroker \((.*)-\d+\) ", changelog)
    assert first == configuration()["project"]["version"]
