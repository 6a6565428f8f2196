"""Programs in the sandbox: correct, wrong and hostile programs."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from luthier.errors import GradingFailed, RecipeError, RowRefused
from luthier.graders import Answer, Code, grade_answers
from luthier.graders.code import code_of
from luthier.graders.sandbox import child, launcher
from luthier.graders.sandbox.launcher import Limits, SandboxError, check_sandbox, passes
from luthier.processes import Cancellable, cancelled_by
from luthier.types import Message, Row

LIMITS = Limits(seconds=3, memory_mb=256)


def can_isolate() -> bool:
    try:
        return passes("", "pass", LIMITS)
    except SandboxError:
        return False


isolated = pytest.mark.skipif(not can_isolate(), reason="needs namespaces of the kernel")


def answer(reply: str, tests: str | None = "assert add(1, 2) == 3") -> Answer:
    return Answer((Message("user", "Write add."),), reply, tests, Row("data.jsonl", 5))


def left_over() -> list[str]:
    """Return the command lines of orphaned sandbox processes.

    Sandboxes of parallel tests have a running ancestor. An orphan has no ancestor, or this process.
    """
    beside = {each.pid for each in psutil.Process(os.getppid()).children()} - {os.getpid()}
    lines = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            line = " ".join(process.cmdline())
            mine = not any(above.pid in beside for above in process.parents())
            if "Runs in the sandbox" in line and mine:
                lines.append(line)
    return lines


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("def f(): pass", "def f(): pass"),
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1"),
        ("```\nx = 1\n```", "x = 1"),
        ("```bash\nls\n```\n```py\nx = 1\n```\n```text\n1\n```", "x = 1"),
        ("```python\nx = 1\n```\nBetter:\n```python\nx = 2\n```", "x = 2"),
        ("```python\nx = 1", "x = 1"),
        ("```json\n{}\n```", "```json\n{}\n```"),
    ],
)
def test_the_program_in_a_reply(reply: str, code: str) -> None:
    assert code_of(reply) == code


@isolated
def test_code_passing_tests_scores_1() -> None:
    good = answer(
        "Sure.\n```python\nimport math\n\ndef add(a, b):\n    return math.fsum((a, b))\n```"
    )
    replies = [good, answer("def add(a, b): return a - b"), answer("I cannot."), answer("")]
    assert grade_answers(Code(allow_code=True), replies).scores == [1.0, 0.0, 0.0, 0.0]


def test_code_grader_is_off_by_default() -> None:
    with pytest.raises(ValueError):
        Code()


@pytest.mark.parametrize("tests", ["", "# none", "assert (", "\0", "x = 1", "import math"])
def test_empty_tests_are_refused(tests: str) -> None:
    with pytest.raises(RowRefused) as refused:
        Code(allow_code=True).check_expected(tests)
    assert refused.value.rule == "grader.bad_tests"


HOSTILE = {
    "ends before the tests": "import os\nos._exit(0)",
    "exits": "raise SystemExit(0)",
    "loops": "while True: pass",
    "sleeps": "import time\ntime.sleep(60)",
    "ignores the alarm": "import signal\nfor s in (14, 15): signal.signal(s, signal.SIG_IGN)\n"
    "signal.setitimer(signal.ITIMER_REAL, 0)\nwhile True: pass",
    "takes memory": "x = bytearray(10**9)",
    "takes disk": "open('big', 'wb').write(b'0' * 10**8)",
    "floods every file": "import os\nfor f in range(3, 64):\n  try: os.write(f, b'x' * 10**6)\n"
    "  except OSError: pass",
    "kills all": "import os\nos.kill(-1, 9)",
    "reads input": "input()",
    "is no Python": "def",
    "has a null": "x = '\0'",
    "is no UTF-8": "x = '\udc80'",
    "is deep": "(" * 100_000,
}


@isolated
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_code_scores_0_within_limits(name: str) -> None:
    started = time.monotonic()
    assert not passes(HOSTILE[name], "pass", Limits(seconds=1, memory_mb=256))
    assert time.monotonic() - started < 20
    assert left_over() == []


@isolated
@pytest.mark.parametrize(
    ("code", "tests"),
    [
        pytest.param(
            "import os, time\ncount = 0\n"
            "try:\n"
            "  while True:\n"
            "    if os.fork() == 0:\n      time.sleep(60)\n      os._exit(0)\n"
            "    count += 1\n"
            "except OSError: pass",
            "assert 1 < count < 20",
            id="few processes",
        ),
        pytest.param(
            "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(60)\n"
            "  os._exit(0)",
            "pass",
            id="a daemon",
        ),
        pytest.param("print('x' * 10**8)", "pass", id="much output"),
        pytest.param(
            "import socket\n"
            "def reach(where):\n"
            "  with socket.socket() as s:\n    s.settimeout(2)\n    return s.connect_ex(where)",
            "assert reach(('127.0.0.1', PORT)) != 0\nassert reach(('1.1.1.1', 53)) != 0",
            id="no network",
        ),
        pytest.param(
            "import os, sys\n"
            "def writes(path):\n"
            "  try: open(path, 'w').close()\n  except OSError: return False\n  return True",
            "assert not os.path.exists('/etc/passwd') and not os.path.exists('/proc/1')\n"
            "assert not os.path.exists('/tmp') and os.listdir('.') == []\n"
            "assert writes('x') and not writes('/usr/x') and not writes(sys.prefix + '/x')\n"
            "assert not any(name in os.environ for name in ('HOME', 'PATH', 'SECRET'))\n"
            "assert os.getuid() != 0",
            id="no files or secrets",
        ),
        pytest.param(
            "import ctypes\nlibc = ctypes.CDLL(None)",
            "assert libc.unshare(0x10000000) and libc.chroot(b'/') and libc.mount(0, b'/', 0, 0, 0)",
            id="no way to privileges",
        ),
        pytest.param(
            "import errno, socket\n"
            "def refused(family, kind):\n"
            "  try: socket.socket(family, kind).close()\n"
            "  except OSError as error: return error.errno == errno.EAFNOSUPPORT\n"
            "  return False\n"
            "kinds = [1, 2, 3, 5, socket.SOCK_STREAM | socket.SOCK_CLOEXEC]",
            "assert all(refused(f, k) for f in range(64) for k in kinds if f not in (1, 2, 10))\n"
            "a, b = socket.socketpair()\na.send(b'x')\nassert b.recv(1) == b'x'\n"
            "socket.socket(socket.AF_INET).close()",
            id="sockets of listed families alone",
        ),
        pytest.param(
            "import ctypes, mmap, os\nlibc = ctypes.CDLL(None, use_errno=True)",
            "try: os.memfd_create('x')\nexcept OSError as error: assert error.errno == 38\n"
            "else: raise AssertionError\n"
            "assert libc.shmget(0, 1 << 20, 0o1600) == -1 and ctypes.get_errno() == 38\n"
            "assert libc.syscall(425, 1, 0) == -1 and ctypes.get_errno() == 38",
            id="no memory outside of processes",
        ),
    ],
)
def test_actions_blocked_by_sandbox(code: str, tests: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program passes its tests, and the tests state the blocked action."""
    import socket

    monkeypatch.setenv("SECRET", "sk-123")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        assert passes(code, tests.replace("PORT", port), LIMITS)
    assert left_over() == []


EIGHT = """
import os, time
for number in range(8):
    if os.fork() == 0:
        if os.fork() == 0:
            os.setsid()
            taken = bytearray({each} << 20)
            for place in range(0, len(taken), 4096):
                taken[place] = 1
            open(f"done-{{number}}", "w").close()
            time.sleep(30)
        os._exit(0)
    os.wait()
while len(os.listdir(".")) < 8:
    time.sleep(0.05)
"""


@isolated
@pytest.mark.parametrize(("each", "passed"), [(8, True), (100, False)])
def test_memory_is_limited_in_all(each: int, passed: bool) -> None:
    """Start daemons in separate sessions, each below the limit."""
    started = time.monotonic()
    assert passes(EIGHT.format(each=each), "pass", Limits(seconds=30, memory_mb=256)) is passed
    assert time.monotonic() - started < 25
    assert left_over() == []


def test_memory_of_ended_process_is_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory can be read once; then the process is gone."""
    sizes = iter(["100 40 30"])
    monkeypatch.setattr(child, "children", lambda proc, pid: [2] if pid == 1 else [])
    monkeypatch.setattr(child, "read", lambda proc, pid, name: next(sizes, ""))
    assert child.memory_in_use(-1, 1, 1 << 30) == 40 * os.sysconf("SC_PAGE_SIZE")
    assert child.memory_in_use(-1, 1, 1 << 30) == 0


@isolated
def test_shared_memory_counts_once() -> None:
    code = (
        "import os, time\nx = bytearray(120 << 20)\n"
        "for place in range(0, len(x), 4096): x[place] = 1\n"
        "for _ in range(6):\n  if os.fork() == 0:\n    time.sleep(1)\n    os._exit(0)\n"
        "for _ in range(6): os.wait()"
    )
    assert passes(code, "pass", Limits(seconds=20, memory_mb=256))


@isolated
def test_cancellation_ends_sandbox() -> None:
    uses: list[Cancellable] = []
    started = time.monotonic()
    with cancelled_by(uses.append):
        timer = threading.Timer(1, lambda: uses[0].close())
        timer.start()
        assert not passes("import time\ntime.sleep(60)", "pass", Limits(60, 256))
    assert time.monotonic() - started < 20
    uses[0].close()
    assert left_over() == []


@isolated
def test_caller_of_grade_answers_can_cancel_sandbox() -> None:
    grader, started = Code(allow_code=True, seconds=60), time.monotonic()
    with cancelled_by(lambda work: threading.Timer(0.5, work.close).start()):
        assert grade_answers(grader, [answer("import time\ntime.sleep(60)")]).scores == [0.0]
    assert time.monotonic() - started < 20


@isolated
def test_sandbox_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = "import os\nos.mkdir('d')\nopen('d/x', 'w').write('x')\nos.chmod('d', 0)"
    assert passes(code, "pass", LIMITS)
    assert list(tmp_path.iterdir()) == []


@isolated
def test_limits_too_low_for_an_empty_program_are_rejected() -> None:
    with pytest.raises(RecipeError, match="seconds"):
        Code(allow_code=True, seconds=0.001).check()


def test_missing_namespaces_are_refused_unless_waived(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = launcher._script("child.py").replace(
        "    flags = NEW_MOUNTS", '    raise OSError("not here")\n    flags = NEW_MOUNTS'
    )
    harness = launcher._script("harness.py")
    scripts = {"child.py": script, "harness.py": harness}
    monkeypatch.setattr(launcher, "_script", scripts.__getitem__)
    check_sandbox.cache_clear()
    try:
        with pytest.raises(RecipeError):
            Code(allow_code=True).check()
        with pytest.raises(GradingFailed):
            grade_answers(Code(allow_code=True), [answer("def add(a, b): return a + b")])
        if os.geteuid() == 0 and not _readable_by_all():
            pytest.skip("the interpreter is root's own, and code does not run as root")
        waived = Limits(seconds=3, memory_mb=256, isolated=False)
        assert passes("def add(a, b): return a + b", "assert add(1, 2) == 3", waived)
        assert not passes("while True: pass", "pass", Limits(1, 256, isolated=False))
        eight = EIGHT.format(each=100)
        assert not passes(eight, "pass", Limits(30, 256, isolated=False))
        daemon = "import os, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(60)"
        assert passes(daemon, "pass", Limits(3, 256, isolated=False))
        assert left_over() == []
    finally:
        check_sandbox.cache_clear()


def _readable_by_all() -> bool:
    import sys

    command = [os.path.realpath(sys.executable), "-I", "-S", "-c", ""]
    try:
        done = subprocess.run(command, user=65534, group=65534, extra_groups=[], check=False)
    except OSError:
        return False
    return done.returncode == 0
