"""Runs Python programs in forks of a process that has imported torch and such, see conftest.py.

These imports are most of the time that a program takes on a few small images.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

_LIMIT = 900  # seconds


def run_forked(
    command: list[str], folder: Path, *, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run what `python -W ignore COMMAND` would: a script, `-c CODE` or `-m MODULE`, and arguments.

    Args:
        folder: for the files that take standard output and error.
        env: variables, in place of this process's.
    """
    context: Any = multiprocessing.get_context("forkserver")
    outputs = [folder / "stdout", folder / "stderr"]
    given = command, outputs, cwd or Path.cwd(), os.environ.copy() if env is None else env
    process = context.Process(target=_run, args=given)
    process.start()
    process.join(_LIMIT)
    if process.is_alive():  # it hangs
        process.kill()
        process.join()
    return subprocess.CompletedProcess(
        command, process.exitcode, *(output.read_text() for output in outputs)
    )


def _run(command: list[str], outputs: list[Path], cwd: Path, env: dict[str, str]) -> None:
    for number, output in enumerate(outputs, 1):
        with output.open("wb") as file:
            os.dup2(file.fileno(), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    warnings.simplefilter("ignore")
    what, *arguments = command
    # Of pytest's own paths the program must not know.
    added = [str(Path(__file__).parents[1] / name) for name in ("", "tools", "tests")]
    found = [p for p in sys.path if p not in added]
    where = str(Path(what).parent) if not what.startswith("-") else ""
    sys.path = [where, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *found]
    sys.argv = command if where else [what, *arguments[1:]]
    try:
        if what == "-c":
            exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
        elif what == "-m":
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(what, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing's ends without them
