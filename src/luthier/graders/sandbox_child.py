"""Builds the sandbox around itself, then becomes the program in it. Runs as ``python -c``, alone.

Three processes: this one waits; ``guard`` is the first of its process namespace and keeps the time;
the third is the code. When ``guard`` ends, the kernel kills whatever is left in the namespace. Whatever
goes wrong before the code runs is written to standard error, which the code itself does not have.
"""

import ctypes
import json
import os
import resource
import signal
import sys
from types import FrameType

NEW_MOUNTS, NEW_IPC, NEW_USERS = 0x00020000, 0x08000000, 0x10000000
NEW_PROCESSES, NEW_NETWORK = 0x20000000, 0x40000000
READ_ONLY, NO_SUID, NO_DEVICES, REMOUNT, BIND = 1, 2, 4, 32, 4096
RECURSIVE, PRIVATE = 16384, 1 << 18
LOCKED = NO_SUID | NO_DEVICES | 8 | 1024 | 2048
"""Flags that a mount keeps: also no programs, no access times, none of folders."""
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/nix/store")
PROCESSES = 16
DISK = 32 * 2**20
FIRST_UID = 1_900_000_000
"""User ids that nobody has; each sandbox of root's has its own, so that processes are counted apart."""


def main() -> None:
    """Prepare, fork, wait."""
    settings = json.loads(sys.argv[1])
    root = os.geteuid() == 0
    uid = FIRST_UID + os.getpid() % 50_000_000 if root else os.getuid()
    try:
        isolate(settings, root, uid)
    except OSError as error:
        if settings["isolated"]:
            fail(f"no namespaces: {error}")
        if root:
            os.chown(settings["folder"], uid, uid)
    if os.fork() == 0:
        guard(settings, root, uid)
    os.wait()


def guard(settings: dict, root: bool, uid: int) -> None:  # type: ignore[type-arg]
    """Start the code and wait for its end, or for the end of its time."""
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
    """Give up what is left, and run the program."""
    try:
        said = os.dup(2)  # closed by exec
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
        python = settings["python"]
        writes = str(settings["writes"])
        os.execve(python, [python, "-I", "-S", "-c", settings["harness"], writes], {})  # noqa: S606
    except OSError as error:
        os.write(said, f"cannot start {settings['python']}: {error}".encode())
        os._exit(1)


def isolate(settings: dict, root: bool, uid: int) -> None:  # type: ignore[type-arg]
    """New namespaces, and a file system of which only the interpreter and libraries are known."""
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
    os.umask(
        0o022
    )  # a server's 077 would close the folders above the interpreter to the code's user
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
    """The system call, with an error that says what."""
    plain = source.encode() if source else None
    kind = b"tmpfs" if source == "tmpfs" else None
    if libc.mount(plain, target.encode(), kind, ctypes.c_ulong(flags), data.encode() or None):
        raise problem(f"mount {target}")


def problem(what: str) -> OSError:
    """The last error of a system call."""
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


def fail(text: str) -> None:
    """Tell why, and end."""
    sys.stderr.write(text)
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    main()
