"""Builds the sandbox around its own process and runs the program inside. Runs as ``python -c``.

The sandbox has three processes. This process waits, and watches the total memory of all processes
of the code. ``guard`` is the first process of the process namespace and enforces the time limit.
The third process runs the code. When ``guard`` ends, the kernel kills all remaining processes of
the namespace. Errors before the start of the code are written to standard error, which is closed to
the code.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
from types import FrameType

NEW_MOUNTS, NEW_IPC, NEW_USERS = 0x00020000, 0x08000000, 0x10000000
NEW_PROCESSES, NEW_NETWORK = 0x20000000, 0x40000000
READ_ONLY, NO_SUID, NO_DEVICES, REMOUNT, BIND = 1, 2, 4, 32, 4096
RECURSIVE, PRIVATE = 16384, 1 << 18
LOCKED = NO_SUID | NO_DEVICES | 8 | 1024 | 2048
"""Mount flags that a remount must keep: no-suid, no-devices, no-exec, no-atime, no-diratime."""
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/nix/store")
PROCESSES = 16
WATCH_SECONDS = 0.01
"""Interval of the memory check, in seconds. A core writes about 20 MB per interval."""
DISK = 32 * 2**20
FIRST_UID = 1_900_000_000
"""First of a range of unused user ids. As root, each sandbox has a separate user id, because the
kernel limits processes per user."""


FAMILIES = (1, 2, 10)
"""Permitted socket families: AF_UNIX, AF_INET and AF_INET6. The internet families have no network
in the sandbox. Further families such as AF_VSOCK reach beyond the network namespace."""
SYSCALLS = {
    "x86_64": (0xC000003E, (41, 53), (319, 447, 425, 29, 68)),
    "aarch64": (0xC00000B7, (198, 199), (279, 447, 425, 194, 186)),
}
"""System call numbers by processor: audit architecture; ``socket`` and ``socketpair``; blocked
calls. ``memfd_create``, ``memfd_secret``, ``shmget`` and ``msgget`` allocate memory outside the
accounting of processes. ``io_uring_setup`` opens sockets without a filtered system call."""
NO_SYSTEM_CALL, NO_FAMILY = 38, 97
"""``ENOSYS`` and ``EAFNOSUPPORT``, the errors of a kernel without the blocked features."""


def main() -> None:
    """Build the sandbox, start ``guard`` and wait."""
    settings = json.loads(sys.argv[1])
    root = os.geteuid() == 0
    proc = -1
    uid = FIRST_UID + os.getpid() % 50_000_000 if root else os.getuid()
    try:
        if sys.platform.startswith("linux"):
            proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)  # the code's root has none
            os.stat(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
            control(36, 1)  # PR_SET_CHILD_SUBREAPER: what is left without a parent is ours
        isolate(settings, root, uid)
    except OSError as error:
        if settings["isolated"]:
            fail(f"no namespaces: {error}")
        if root:
            os.chown(settings["folder"], uid, uid)
    first = os.fork()
    if first == 0:
        if proc >= 0:
            os.close(proc)
        guard(settings, root, uid)
    if proc >= 0:
        watch(proc, first, settings["memory"])
    else:
        os.waitpid(first, 0)


def watch(proc: int, first: int, memory: int) -> None:
    """Wait for ``guard``, and kill ``guard`` if its processes use more than ``memory`` bytes."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while os.waitpid(first, os.WNOHANG)[0] == 0:
        signal.sigtimedwait({signal.SIGCHLD}, WATCH_SECONDS)
        if memory_in_use(proc, first, memory) > memory:
            os.kill(first, signal.SIGKILL)
    # Without namespaces what is left is ours now, wherever it has put itself.
    while left := children(proc, os.getpid()):
        for pid in left:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def memory_in_use(proc: int, first: int, memory: int) -> int:
    """Return the memory of all processes below ``first``, in bytes.

    Shared pages count for each process, unless the sum exceeds ``memory``: the kernel needs
    milliseconds to divide shared pages.
    """
    pids, waiting = [], children(proc, first)
    while waiting:
        pids.append(waiting.pop())
        waiting += children(proc, pids[-1])
    sizes = (read(proc, pid, "statm") for pid in pids)
    pages = sum(int(size.split()[1]) for size in sizes if size)
    size = pages * resource.getpagesize()
    return size if size <= memory else sum(share(proc, pid) for pid in pids)


def share(proc: int, pid: int) -> int:
    """Return the proportional memory of a process, in bytes."""
    for line in read(proc, pid, "smaps_rollup").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def children(proc: int, pid: int) -> list:  # type: ignore[type-arg]
    """Return the child processes of ``pid``; empty for an ended process."""
    found: list[int] = []
    try:
        tasks = os.open(f"{pid}/task", os.O_RDONLY | os.O_DIRECTORY, dir_fd=proc)
    except FileNotFoundError:
        return []
    try:
        for task in os.listdir(tasks):
            found += map(int, read(proc, pid, f"task/{task}/children").split())
    except ProcessLookupError:
        pass
    finally:
        os.close(tasks)
    return found


def read(proc: int, pid: int, name: str) -> str:
    """Read a file of a process in /proc; empty for an ended process."""
    try:
        file = os.open(f"{pid}/{name}", os.O_RDONLY, dir_fd=proc)
    except (FileNotFoundError, ProcessLookupError):
        return ""
    try:
        return os.read(file, 1 << 16).decode()
    except ProcessLookupError:
        return ""
    finally:
        os.close(file)


def block_calls() -> None:
    """Block sockets and memory that no other limit covers, with a seccomp filter.

    Raises:
        OSError: the kernel or the processor has no such filter.
    """
    calls = SYSCALLS.get(platform.machine())
    if calls is None:
        raise OSError(f"no list of system calls for {platform.machine()}")
    name, sockets, blocked = calls
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    allow, kill, error = 0x7FFF0000, 0x80000000, 0x00050000
    # Steps are (code, steps to skip where true, where false, value), as in struct sock_filter.
    family = [
        (load, 0, 0, 16),  # the lower half of the first argument
        *((equal, len(FAMILIES) - n, 0, each) for n, each in enumerate(FAMILIES)),
        (give, 0, 0, error | NO_FAMILY),
        (give, 0, 0, allow),
    ]
    steps = [
        (load, 0, 0, 4),
        (equal, 1, 0, name),  # another architecture's calls have other numbers
        (give, 0, 0, kill),
        (load, 0, 0, 0),
        (at_least, 0, 1, 0x40000000),  # x32: the same, with numbers of its own
        (give, 0, 0, kill),
    ]
    for call in blocked:
        steps += [(equal, 0, 1, call), (give, 0, 0, error | NO_SYSTEM_CALL)]
    steps += [
        (equal, 2, 0, sockets[0]),
        (equal, 1, 0, sockets[1]),
        (give, 0, 0, allow),
        *family,
    ]
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in steps))
    whole = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(program)))
    control(38, 1)  # PR_SET_NO_NEW_PRIVS
    control(22, 2, ctypes.addressof(whole))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def control(*values: int) -> None:
    """Call ``prctl``."""
    libc = ctypes.CDLL(None, use_errno=True)
    given = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[1:5]]
    if libc.prctl(values[0], *given):
        raise problem(f"prctl {values[0]}")


def guard(settings: dict, root: bool, uid: int) -> None:  # type: ignore[type-arg]
    """Start the code, and wait for its end or for the time limit."""
    child = os.fork()
    if child == 0:
        become(settings, root, uid)

    def over(number: int, frame: FrameType | None) -> None:
        os._exit(0)

    signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, settings["seconds"])
    while os.wait()[0] != child:
        pass
    os._exit(0)


def become(settings: dict, root: bool, uid: int) -> None:  # type: ignore[type-arg]
    """Drop the remaining privileges, set limits and run the program."""
    try:
        errors = os.dup(2)  # closed by exec
        quiet = os.open("/null" if os.path.exists("/null") else "/dev/null", os.O_RDWR)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        if root:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
        seconds = int(settings["seconds"]) + 1
        for kind, most in (
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_AS, settings["memory"]),
            (resource.RLIMIT_FSIZE, DISK),
            (resource.RLIMIT_NOFILE, 64),
            (resource.RLIMIT_NPROC, PROCESSES),
            (resource.RLIMIT_CORE, 0),
        ):
            now = resource.getrlimit(kind)[1]
            most = most if now == resource.RLIM_INFINITY else min(most, now)
            resource.setrlimit(kind, (most, most))
        try:
            block_calls()
        except OSError as error:
            if settings["isolated"]:
                os.write(errors, f"no filter of system calls: {error}".encode())
                os._exit(1)
        python = settings["python"]
        writes = str(settings["writes"])
        os.execve(python, [python, "-I", "-S", "-c", settings["harness"], writes], {})  # noqa: S606
    except OSError as error:
        os.write(errors, f"cannot start {settings['python']}: {error}".encode())
        os._exit(1)


def isolate(settings: dict, root: bool, uid: int) -> None:  # type: ignore[type-arg]
    """Create namespaces, and a file system with the interpreter and libraries only."""
    if not sys.platform.startswith("linux"):
        raise OSError("they are Linux's")
    flags = NEW_MOUNTS | NEW_IPC | NEW_PROCESSES | NEW_NETWORK | (0 if root else NEW_USERS)
    gid = os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags):
        raise problem("unshare")
    if not root:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    top = settings["folder"]
    # With a server's umask of 077, the code's user could not open the interpreter's folders.
    os.umask(0o022)
    mount(libc, None, "/", 0 | RECURSIVE | PRIVATE)
    mount(libc, "tmpfs", top, NO_SUID | NO_DEVICES, f"size={DISK},nr_inodes=4096,mode=755")
    for path in (*SYSTEM, settings["prefix"]):
        if os.path.islink(path):
            os.symlink(os.readlink(path), top + path)
        elif os.path.isdir(path) and not os.path.exists(top + path):
            os.makedirs(top + path)
            mount(libc, path, top + path, BIND | RECURSIVE)
            locked = os.statvfs(path).f_flag & LOCKED
            mount(libc, None, top + path, BIND | REMOUNT | READ_ONLY | locked)
    with open(top + "/null", "w"):
        pass
    mount(libc, "/dev/null", top + "/null", BIND)
    os.mkdir(top + "/work")
    if root:
        os.chown(top + "/work", uid, uid)
    os.chroot(top)
    os.chdir("/work")


def mount(libc: ctypes.CDLL, source: str | None, target: str, flags: int, data: str = "") -> None:
    """Call ``mount``."""
    plain = source.encode() if source else None
    kind = b"tmpfs" if source == "tmpfs" else None
    if libc.mount(plain, target.encode(), kind, ctypes.c_ulong(flags), data.encode() or None):
        raise problem(f"mount {target}")


def problem(what: str) -> OSError:
    """Return the last error of a system call."""
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


def fail(text: str) -> None:
    """Write ``text`` to standard error and exit."""
    sys.stderr.write(text)
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    main()
