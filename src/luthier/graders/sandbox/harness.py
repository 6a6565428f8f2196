"""Runs in the sandbox: the code and its tests, then writes a token of success."""

import json
import os
import sys


def main(writes: int) -> None:
    """Read the code from standard input, run the code, and write the token and the requested value."""
    request = json.load(sys.stdin)
    names = {"__name__": "reply"}
    exec(compile(request["code"], "reply.py", "exec"), names)  # noqa: S102
    exec(compile(request["tests"], "tests.py", "exec"), names)  # noqa: S102
    output = json.dumps(names.get("result")) if request["value"] else ""
    os.write(writes, (request["token"] + output)[:4096].encode())
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
