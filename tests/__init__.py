"""The tests of plexus_lite: `python -m unittest` runs the modules in a few processes: most of their time is waiting.

One module, class or test is run as ever: `python -m unittest tests.test_relay`.
"""

import concurrent.futures
import io
import os
import unittest
from typing import Any, List, NamedTuple, Optional, Tuple

FOLDER = os.path.dirname(os.path.abspath(__file__))
PROCESSES = min((os.cpu_count() or 1) + 1, 4)
LISTS = ("failures", "errors", "skipped", "expectedFailures")


class Told(NamedTuple):
    """A test that ran in another process, as far as a result shows it."""

    text: str

    def __str__(self) -> str:
        return self.text

    def id(self) -> str:
        return self.text

    def shortDescription(self) -> Optional[str]:
        return None


class Outcome(NamedTuple):
    run: int
    lists: List[List[Tuple[Told, str]]]
    surprises: List[Told]
    printed: str


def run_module(name: str, patterns: Optional[List[str]], verbosity: int) -> Outcome:
    """Run the module *name* in this process."""
    loader = unittest.TestLoader()
    loader.testNamePatterns = patterns
    stream = io.StringIO()
    runner = unittest.TextTestRunner(stream, verbosity=verbosity)
    result: Any = runner._makeResult()  # run() would add a summary
    loader.loadTestsFromName(name).run(result)
    lists = [[(Told(result.getDescription(test)), text) for test, text in getattr(result, one)] for one in LISTS]
    surprises = [Told(result.getDescription(test)) for test in result.unexpectedSuccesses]
    return Outcome(result.testsRun, lists, surprises, stream.getvalue())


class Modules(unittest.TestSuite):
    """Test modules that are run in processes of their own, the largest first."""

    def __init__(self, patterns: Optional[List[str]]) -> None:
        super().__init__()
        self._patterns = patterns
        files = [file for file in os.listdir(FOLDER) if file.startswith("test_") and file.endswith(".py")]
        files.sort(key=lambda file: (-os.path.getsize(os.path.join(FOLDER, file)), file))
        self._names = [f"{__name__}.{file[:-3]}" for file in files]

    def run(self, result: Any, debug: bool = False) -> Any:
        verbosity = 2 if getattr(result, "showAll", False) else int(getattr(result, "dots", False))
        with concurrent.futures.ProcessPoolExecutor(PROCESSES) as pool:
            running = [pool.submit(run_module, name, self._patterns, verbosity) for name in self._names]
            for future in concurrent.futures.as_completed(running):
                outcome = future.result()
                result.testsRun += outcome.run
                for one, rows in zip(LISTS, outcome.lists):
                    getattr(result, one).extend(rows)
                result.unexpectedSuccesses.extend(outcome.surprises)
                if hasattr(result, "stream"):
                    result.stream.write(outcome.printed)
                    result.stream.flush()
        return result


def load_tests(loader: Any, tests: unittest.TestSuite, pattern: Optional[str]) -> unittest.TestSuite:
    """What unittest asks when it discovers this folder."""
    return Modules(loader.testNamePatterns)
