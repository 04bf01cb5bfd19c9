"""Run the README's test command under every CPython 3.8+ of this machine, and add up the results.

usage: python3 .ci/unittests.py LOG_FOLDER

Exit code 0 if every run passed.  PLEXUS_CI_JOBS=2 runs two interpreters at a time.
"""

import concurrent.futures
import glob
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import Dict, Iterator, List, NamedTuple, Set, Tuple

TIMEOUT_S = 300  # for one interpreter; a run takes a fraction of it, so only a hang gets there
NAMES = [f"python3.{minor}" for minor in range(8, 15)] + ["python3.13t", "python3.14t"]
PROBE = """
import platform, sys, sysconfig
free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
print(platform.python_implementation(), platform.python_version(), free_threaded, sys.executable, sep="\\n")
"""


class Interpreter(NamedTuple):
    minor: Tuple[int, int]
    free_threaded: bool
    version: str
    path: str

    @property
    def name(self) -> str:
        return "python{}.{}{}".format(*self.minor, "t" if self.free_threaded else "")


class Result(NamedTuple):
    interpreter: Interpreter
    output: str
    exit_code: int  # negative: the signal that ended it
    seconds: float


class Tally(NamedTuple):
    passed: int
    failed: int
    skipped: int


# ---------------------------------------------------------------------------
# Interpreters
# ---------------------------------------------------------------------------


def candidates() -> Iterator[str]:
    """Yield commands that may be a Python, the default one first."""
    yield from ["python3", *NAMES]
    roots = {os.environ.get("PYENV_ROOT", ""), os.path.expanduser("~/.pyenv")}
    if shutil.which("pyenv"):
        roots.add(subprocess.run(["pyenv", "root"], stdout=subprocess.PIPE, text=True).stdout.strip())
    for root in sorted(filter(None, roots)):
        yield from sorted(glob.glob(os.path.join(glob.escape(root), "versions", "*", "bin", "python3")))


def find_interpreters() -> List[Interpreter]:
    """Return one CPython per minor version and build, oldest first, the default one last."""
    found: Dict[Tuple[Tuple[int, int], bool], Interpreter] = {}
    for command in candidates():
        try:
            probe = subprocess.run(
                [command, "-c", PROBE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=30
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if probe.returncode != 0:  # such as pyenv's stand-in for a version that is not switched on
            continue
        implementation, version, free_threaded, path = probe.stdout.splitlines()
        major, minor = version.split(".")[:2]
        one = Interpreter((int(major), int(minor)), free_threaded == "True", version, path)
        if implementation == "CPython" and one.minor >= (3, 8):
            found.setdefault((one.minor, one.free_threaded), one)
    default = next(iter(found.values()), None)
    return sorted(found.values(), key=lambda one: (one is default, one.minor, one.free_threaded))


# ---------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------


def run_tests(interpreter: Interpreter, log_folder: str) -> Result:
    """Run the tests; a run that hangs shows where each of its threads stands, and is ended."""
    log_path = os.path.join(log_folder, interpreter.name + ".log")
    command = [interpreter.path, "-m", "unittest", "-v"]
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}  # SIGABRT then prints the stacks
    started = time.monotonic()
    with open(log_path, "wb") as log, subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
    ) as process:
        try:
            process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)
            time.sleep(2)
            os.killpg(process.pid, signal.SIGKILL)  # with the programs that the tests had started
    seconds = time.monotonic() - started
    with open(log_path, encoding="utf-8", errors="replace") as text:
        return Result(interpreter, text.read(), process.returncode, seconds)


def outcomes(output: str) -> Iterator[Tuple[str, str]]:
    """Yield each test and its outcome (ok, ERROR, skipped 'reason', ...) from the lines of a verbose run.

    A test's name begins a line; its docstring and whatever it writes may come between that and its outcome.
    """
    test, is_open = "?", False
    for line in output.splitlines():
        head = re.match(r"([\w.]+) \(([\w.]+)\)(?: \.\.\. |$)", line)
        if head:
            name, where = head.groups()
            test = where if where.endswith("." + name) else f"{where}.{name}"  # since 3.11, and before
            is_open = True
        outcome = re.search(r"(?:ok|FAIL|ERROR|(?:un)?expected (?:failure|success)|skipped (?:'.*'|\".*\"))$", line)
        if outcome and is_open:
            yield test, outcome.group()
            is_open = False
        elif outcome and outcome.group().startswith("skipped"):  # some versions name neither
            yield f"set-up or subtest, after {test}", outcome.group()


def count(result: Result) -> Tally:
    """Add up unittest's own words.  A run that broke off, or ran nothing, has at least one failure."""
    ran = re.findall(r"^Ran (\d+) tests? in ", result.output, re.MULTILINE)
    summary = re.findall(r"^(?:OK|FAILED) \((.*)\)$", result.output, re.MULTILINE)
    numbers = dict(part.split("=") for part in summary[-1].split(", ")) if summary else {}
    failed = sum(int(numbers.get(name, 0)) for name in ("failures", "errors", "unexpected successes"))
    skipped = int(numbers.get("skipped", 0))
    # "Ran" alone would not do: 3.12.1 leaves skipped tests out of it, and a skipped class is skipped but never ran.
    passed = sum(outcome in ("ok", "expected failure") for _, outcome in outcomes(result.output))
    passed = max(passed, int(ran[-1]) - failed - skipped if ran else 0)
    if result.exit_code != 0 or not ran or passed + failed == 0:
        failed = max(failed, 1)
    return Tally(passed, failed, skipped)


def show(result: Result, tally: Tally, shown_skips: Set[str]) -> None:
    """Print the skips that no earlier run had, what went wrong, and unittest's summary."""
    one = result.interpreter
    print(f"\n-- {one.name} ({one.version}, {one.path}): {result.seconds:.1f} s")
    skips = [f"{test}: {outcome}" for test, outcome in outcomes(result.output) if outcome.startswith("skipped")]
    for skip in sorted(set(skips) - shown_skips):
        print(skip)
    shown_skips.update(skips)
    if len(skips) < tally.skipped:
        print(f"{tally.skipped - len(skips)} more skipped, whose names cannot be read from the output")
    summary_at = max(result.output.rfind("\n" + "-" * 70 + "\nRan "), 0)
    if tally.failed:
        first_failure = result.output.find("=" * 70)
        print(result.output[first_failure:] if 0 <= first_failure < summary_at else result.output[-20000:])
        print(f"{one.name}: exit code {result.exit_code} of python -m unittest")
    else:
        print(result.output[summary_at:].strip())


def main(log_folder: str) -> int:
    interpreters = find_interpreters()
    missing = sorted(set(NAMES) - {one.name for one in interpreters}, key=NAMES.index)
    print("found:", ", ".join(f"{one.name} ({one.version})" for one in interpreters) or "none")
    print("not on this machine:", ", ".join(missing) or "none", flush=True)
    tallies: List[Tally] = []
    shown_skips: Set[str] = set()
    with concurrent.futures.ThreadPoolExecutor(int(os.environ.get("PLEXUS_CI_JOBS", "1"))) as pool:
        for result in pool.map(lambda one: run_tests(one, log_folder), interpreters):
            tallies.append(count(result))
            show(result, tallies[-1], shown_skips)
            sys.stdout.flush()
    total = Tally(*map(sum, zip(*tallies))) if tallies else Tally(0, 1, 0)
    print("\n{} passed, {} failed, {} skipped".format(*total))
    return 1 if total.failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
