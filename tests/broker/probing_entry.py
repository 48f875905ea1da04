"""Started in the place of broker/entry.py, by the launcher: runs the same code, and tells how it is inside.

Not imported by anybody. It is given the true entry and what to do, as JSON, and
imports nothing that the entry does not import; everything else is the broker's
own way: handover, checks, Landlock, seccomp. There is no hook in the broker for
it; it stands where a bug would stand that runs code of an attacker.

- `modules`: the names of all modules when serving begins and when it ends.
- `tries`: Python expressions, each evaluated when serving begins; the result, or the errno.
- `deadly`: expressions that the filter is expected to punish. Each is evaluated in a fork of the process,
  made at the last moment at which it can fork: everything is done but the filter, which the fork then
  installs as the broker does. The answer is how the fork ended.

The answers go to the file descriptor `out`, as JSON.
"""

from __future__ import annotations

import os
import sys

instructions_text, entry_file, *arguments = sys.argv[1:]
sys.argv = [entry_file, *arguments]
entry = {"__name__": "entry", "__file__": entry_file}
with open(entry_file, "rb") as source:
    exec(compile(source.read(), entry_file, "exec"), entry)  # noqa: S102 - the entry as it is, but for its last line
sys.meta_path.append(
    entry["TrustedFinder"](os.path.dirname(os.path.dirname(entry_file)), check=False)  # type: ignore[operator]
)

# What the entry would import next, and by that the rest.
from fdbroker.broker import main  # noqa: E402
from fdbroker.broker.server import Broker  # noqa: E402
from fdbroker.kernel import libc, seccomp  # noqa: E402

# Not imported: what the broker does not load must not be there.
json, socket = sys.modules["json"], sys.modules["socket"]
instructions = json.loads(instructions_text)
answers: dict[str, object] = {"tries": {}, "deadly": {}}
serve = Broker.serve
install = seccomp.install
names = {"os": os, "libc": libc, "main": main, "sys": sys, "socket": socket}


def evaluate(expression: str, more: dict[str, object]) -> object:
    """Return what an expression gives, or by which error it fails."""
    try:
        result = eval(expression, {**names, **more})  # noqa: S307 - written by the test
    except OSError as error:
        return {"errno": error.errno}
    return result if isinstance(result, int | str | list) else repr(result)


def in_fork(expression: str, program: bytes) -> str:
    """Return how a fork ends that evaluates an expression under the filter."""
    pid = os.fork()
    if not pid:
        install(program)
        result = evaluate(expression, {})
        os.write(2, f"{expression}: {result}\n".encode())
        os._exit(7)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return f"signal {-status}" if status < 0 else f"exit {status}"


def install_after_forks(program: bytes) -> None:
    answers["deadly"] = {text: in_fork(text, program) for text in instructions["deadly"]}
    install(program)


def serve_and_tell(broker: Broker) -> None:
    opener = broker._dispatch.generation.opener
    held = {"roots": [root.descriptor for root in opener.roots], "proc": opener._proc_self_fd}
    begin = sorted(sys.modules)
    answers["tries"] = {text: evaluate(text, held) for text in instructions["tries"]}
    serve(broker)
    answers["modules"] = {"begin": begin, "end": sorted(sys.modules)}
    os.write(instructions["out"], json.dumps(answers).encode())


seccomp.install = install_after_forks
Broker.serve = serve_and_tell  # type: ignore[assignment,method-assign]
sys.exit(entry["main"]())  # type: ignore[operator]
