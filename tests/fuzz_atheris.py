"""The properties of test_fuzz under a coverage-guided fuzzer:  python -m tests.fuzz_atheris TARGET [-max_total_time=30]

TARGET is request, answer, events, json, content or usage; what follows goes to libFuzzer.  It starts from
test_fuzz's seeds and keeps nothing but the input of a finding, in the folder for temporary files.  Exit code 0:
nothing found; 1: something, with its traceback; 3: atheris (pip install atheris) is not installed.
"""

import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from typing import List

NOT_INSTALLED = 3
TARGETS = ("request", "answer", "events", "json", "content", "usage")  # as in test_fuzz, which imports the program
INSIDE = "--inside"


def main(arguments: List[str]) -> int:
    """Run the fuzzer in a process of its own, since it ends without a word to Python, and clean up after it."""
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed")
        return NOT_INSTALLED
    if not arguments or arguments[0] not in TARGETS:
        print(f"usage: python -m tests.fuzz_atheris {{{','.join(TARGETS)}}} [-max_total_time=30]")
        return 2
    with tempfile.TemporaryDirectory(prefix="plexus-fuzz-") as folder:
        command = [sys.executable, "-m", "tests.fuzz_atheris", INSIDE, folder, *arguments]
        return 1 if subprocess.call(command) else 0


def fuzz(folder: str, name: str, options: List[str]) -> None:
    """Fuzz target *name*; ends the process."""
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["plexus_lite"]):
        importlib.import_module("plexus_lite")
    cases = importlib.import_module("tests.test_fuzz")  # only now: it imports the program
    check, seeds, near = cases.TARGETS[name]

    def run(data: bytes) -> None:
        check(data)

    corpus = os.path.join(folder, "corpus")
    os.mkdir(corpus)
    for number, seed in enumerate((*seeds, *near)):
        with open(os.path.join(corpus, str(number)), "wb") as file:
            file.write(seed)
    dictionary = os.path.join(folder, "tokens")
    with open(dictionary, "w", encoding="ascii") as words:
        for token in cases.TOKENS:
            if len(token) < 40:
                hexadecimal = "".join(f"\\x{byte:02x}" for byte in token)
                words.write(f'"{hexadecimal}"\n')
    found = os.path.join(tempfile.gettempdir(), f"plexus-found-{name}-")
    standard = [f"-dict={dictionary}", "-max_len=2000", f"-artifact_prefix={found}", "-max_total_time=30"]
    atheris.Setup([sys.argv[0], *standard, *options, corpus], run)
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] == [INSIDE]:
        fuzz(sys.argv[2], sys.argv[3], sys.argv[4:])
    raise SystemExit(main(sys.argv[1:]))
