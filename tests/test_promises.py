"""What the file promises of itself: its imports, its order, its documents."""

import ast
import functools
import importlib.util
import json
import os
import re
import symtable
import sys
import sysconfig
import unittest
from typing import Any, Dict, Iterator, List, Set, Tuple

import plexus_lite
from tests.support import PROGRAM, run_cli

FOLDER = os.path.dirname(PROGRAM)
# Modules that some systems or versions lack.  A function may import them and go another way; the file may not.
OPTIONAL = {"compression", "fcntl", "grp", "msvcrt", "pwd", "resource", "syslog", "termios", "winreg"}
OPTIONS = ("--config", "--host", "--port", "--log-file", "--log-level", "--json", "--version", "--help")
SETTINGS: Tuple[Any, ...] = (
    plexus_lite.Config,
    plexus_lite.Tls,
    plexus_lite.Key,
    plexus_lite.Provider,
    plexus_lite.Alias,
    plexus_lite.AliasTarget,
    plexus_lite.Price,
    plexus_lite.Limits,
)
# Name used, place that uses it: why it may point down.  Empty, and that is the aim.
POINTING_DOWN: Dict[Tuple[str, str], str] = {}


def read(*path: str) -> str:
    with open(os.path.join(FOLDER, *path), encoding="utf-8") as file:
        return file.read()


SOURCE = read("plexus_lite.py")
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)


@functools.lru_cache(maxsize=None)
def banners() -> List[Tuple[int, int, str, str]]:
    """Return (first line, number, name, rest of the banner) of each room."""
    found = []
    for place, line in enumerate(LINES):
        banner = re.match(r"^# +([0-9]+)  (.+)$", line)
        if banner:
            text, below = banner.group(2), place + 1
            while re.match(r"^#  ", LINES[below]):
                text += " " + LINES[below].lstrip("# ")
                below += 1
            name, _, rest = text.partition(" -- ")
            found.append((place + 1, int(banner.group(1)), name, rest))
    return found


def room_of(line: int) -> int:
    """Return the room in which *line* (1 is the first) stands, 0 for what is above all rooms."""
    return max((number for begin, number, _, _ in banners() if begin <= line), default=0)


def top_level_names() -> Dict[str, int]:
    """Return each name that the file defines at its top level, with the line of its first definition."""
    found: Dict[str, int] = {}
    for node in TREE.body:
        names: List[str] = []
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [one.id for target in node.targets for one in ast.walk(target) if isinstance(one, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        for name in names:
            found.setdefault(name, node.lineno)
    return found


def module_names_used(table: Any) -> Iterator[Tuple[str, int]]:
    """Yield (name, line of the scope) for each module-level name that a scope inside *table* uses."""
    for child in table.get_children():
        # Since Python 3.14 the annotations of a module are a scope, too, which begins at the first of them.
        if (table.get_name(), child.get_name()) == ("top", "__annotate__"):
            continue
        for symbol in child.get_symbols():
            if symbol.is_global() and symbol.is_referenced():
                yield symbol.get_name(), child.get_lineno()
        yield from module_names_used(child)


def help_text() -> str:
    return run_cli("--help").stdout


def has_word(word: str, text: str) -> bool:
    return re.search(r"(?<![\w-])" + re.escape(word) + r"(?![\w-])", text) is not None


class Imports(unittest.TestCase):
    def imported(self, tree: ast.AST) -> Iterator[Tuple[str, int]]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield alias.name.split(".")[0], node.lineno
            elif isinstance(node, ast.ImportFrom):
                self.assertEqual(node.level, 0, "a relative import")
                yield (node.module or "").split(".")[0], node.lineno

    def assertStandard(self, name: str, line: int) -> None:
        """Assert that *name* is a module of the standard library, by where this interpreter keeps it."""
        if name in sys.builtin_module_names or name in OPTIONAL:
            return
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None, f"line {line}: no module {name}"
        origin = os.path.normcase(os.path.realpath(spec.origin))
        homes = [os.path.normcase(os.path.realpath(sysconfig.get_path(key))) for key in ("stdlib", "platstdlib")]
        standard = spec.origin == "frozen" or any(origin.startswith(home + os.sep) for home in homes)
        self.assertTrue(standard and "site-packages" not in origin, f"line {line}: {name} is at {origin}")

    def test_only_the_standard_library_is_imported(self):
        found = list(self.imported(TREE))
        self.assertGreater(len(found), 20)
        for name, line in found:
            with self.subTest(name):
                self.assertStandard(name, line)

    def test_what_some_systems_lack_is_not_imported_by_the_file_itself(self):
        for node in TREE.body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                for name, line in self.imported(node):
                    self.assertNotIn(name, OPTIONAL, f"line {line}")

    def test_the_tests_need_nothing_else_either(self):
        for file in sorted(os.listdir(os.path.join(FOLDER, "tests"))):
            if file.endswith(".py"):
                for name, line in self.imported(ast.parse(read("tests", file))):
                    with self.subTest(file, name=name):
                        if name not in ("plexus_lite", "tests"):
                            self.assertStandard(name, line)


class Order(unittest.TestCase):
    def test_banners_are_the_table_of_contents(self):
        rows = re.findall(r"^ +([0-9]+)  (\w+(?: \w+)?)  +\S", plexus_lite.__doc__ or "", re.MULTILINE)
        table = [(int(number), name) for number, name in rows]
        self.assertEqual(table, [(number, name) for _, number, name, _ in banners()])
        self.assertEqual([number for number, _ in table], list(range(1, len(table) + 1)))
        self.assertGreaterEqual(len(table), 10)

    def test_every_banner_is_framed_by_rules(self):
        rule = "# " + "-" * 75
        for line, number, _, _ in banners():
            with self.subTest(number):
                self.assertEqual(LINES[line - 2], rule)
                below = line
                while LINES[below].startswith("#  "):
                    below += 1
                self.assertEqual(LINES[below], rule)

    def test_what_a_banner_names_stands_in_its_room(self):
        defined: Dict[int, Set[str]] = {}
        for node in ast.walk(TREE):
            name = getattr(node, "name", None)
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                name = next((one.id for one in targets if isinstance(one, ast.Name)), None)
            if name:
                defined.setdefault(room_of(getattr(node, "lineno", 0)), set()).add(name)
        for _, number, title, rest in banners():
            # The list of names ends at the first sentence that is none; names have "_" or capitals inside.
            listed = re.split(r"\.\s|:\s", rest + " ")[0]
            for name in re.findall(r"\b(?:[a-z]+_[a-z_]+|[A-Z]+[a-z]+[A-Z]\w*|[A-Z]{4,})\b", listed):
                with self.subTest(f"{number} {title}", name=name):
                    self.assertIn(name, defined.get(number, set()))

    def test_the_waterline_stands_where_the_table_has_it(self):
        line = next(place for place, text in enumerate(LINES, 1) if re.match(r"^# +Below this line: ", text))
        above, below = room_of(line), min(number for begin, number, _, _ in banners() if begin > line)
        self.assertEqual(below, above + 1)
        docstring = plexus_lite.__doc__ or ""
        before, _, after = docstring.partition("--- waterline ---")
        self.assertEqual(re.findall(r"^ +([0-9]+)  ", before, re.MULTILINE)[-1], str(above))
        self.assertEqual(re.findall(r"^ +([0-9]+)  ", after, re.MULTILINE)[0], str(below))

    def test_no_function_and_no_class_uses_a_name_of_a_lower_room(self):
        """Annotations in quotes are not looked at: they name, and use nothing."""
        defined = top_level_names()
        found = set()
        for name, line in module_names_used(symtable.symtable(SOURCE, "plexus_lite.py", "exec")):
            if name in defined and room_of(defined[name]) > room_of(line):
                place = f"line {line}, room {room_of(line)}"
                owner = max((one for one, begin in defined.items() if begin <= line), key=lambda one: defined[one])
                if (name, owner) not in POINTING_DOWN:
                    found.add(f"{owner} ({place}) uses {name} of room {room_of(defined[name])}")
        self.assertEqual(sorted(found), [])

    def test_this_test_sees_a_name_that_points_down(self):
        table = symtable.symtable("def f(a):\n    b = 1\n    return [c for b in d(a)], b, print\n", "x", "exec")
        self.assertEqual({name for name, _ in module_names_used(table)}, {"c", "d", "print"})

    def test_no_socket_thread_clock_or_file_is_touched_above_the_waterline(self):
        line = next(place for place, text in enumerate(LINES, 1) if re.match(r"^# +Below this line: ", text))
        allowed = {"threading.Lock", "time.strftime", "time.gmtime"}  # a lock around a map; a time that is handed in
        modules = {"socket", "selectors", "select", "ssl", "threading", "time", "os", "subprocess", "signal", "queue"}
        for node in ast.walk(TREE):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.lineno < line:
                used = f"{node.value.id}.{node.attr}"
                if node.value.id in modules and used not in allowed:
                    self.fail(f"line {node.lineno}: {used}")
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.lineno < line:
                self.assertNotIn(node.func.id, ("open", "print", "input"), f"line {node.lineno}")
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.lineno < line:
                reads_clock = node.func.attr in ("formatdate", "now", "utcnow", "today") and not node.args
                self.assertFalse(reads_clock, f"line {node.lineno}: {node.func.attr} reads the clock")


class State(unittest.TestCase):
    """No mutable state at module level: main builds the objects and hands them on."""

    def test_no_global_and_no_nonlocal_module_state(self):
        for node in ast.walk(TREE):
            self.assertNotIsInstance(node, ast.Global, f"line {getattr(node, 'lineno', 0)}")

    def test_module_level_values_are_final_or_types(self):
        for node in TREE.body:
            line = f"line {node.lineno}: {LINES[node.lineno - 1]}"
            if isinstance(node, ast.Assign):
                # Without an annotation: only an alias of a type, or a TypeVar.
                value = node.value
                is_alias = isinstance(value, (ast.Subscript, ast.Name, ast.Attribute))
                is_type_var = isinstance(value, ast.Call) and getattr(value.func, "id", "") in ("TypeVar", "NewType")
                self.assertTrue(is_alias or is_type_var, line)
            elif isinstance(node, ast.AnnAssign):
                self.assertIn("Final", ast.dump(node.annotation), line)
            else:
                self.assertNotIsInstance(node, (ast.AugAssign, ast.Delete, ast.For, ast.While), line)

    def test_nothing_locks_or_collects_at_module_level(self):
        for node in TREE.body:
            value = getattr(node, "value", None)
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(value, ast.Call):
                made = ast.dump(value.func)
                for name in ("Lock", "Event", "Condition", "Thread", "defaultdict", "deque", "OrderedDict", "local"):
                    self.assertNotIn(f"'{name}'", made, f"line {node.lineno}")
                self.assertNotIn(getattr(value.func, "id", ""), ("dict", "list", "set"), f"line {node.lineno}")

    def test_no_function_changes_a_module_level_value(self):
        names = {name for name in top_level_names() if name.isupper()}
        changing = {"append", "extend", "insert", "remove", "pop", "popitem", "clear", "update", "setdefault", "add"}
        changing |= {"discard", "sort", "reverse", "appendleft", "popleft"}
        for node in ast.walk(TREE):
            targets: List[ast.AST] = []
            if isinstance(node, (ast.Assign, ast.Delete)):
                targets = list(node.targets)
            elif isinstance(node, ast.AugAssign):
                targets = [node.target]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in changing:
                targets = [node.func]
            for target in targets:
                inner = getattr(target, "value", None)
                if isinstance(target, (ast.Subscript, ast.Attribute)) and isinstance(inner, ast.Name):
                    self.assertNotIn(inner.id, names, f"line {getattr(node, 'lineno', 0)}")


class Documents(unittest.TestCase):
    @staticmethod
    def keys() -> Iterator[Tuple[str, str]]:
        """Yield (path, key) of every configuration key."""
        for cls in SETTINGS:
            for name in cls.rows:
                yield f"{cls.__name__}.{name}", name

    def test_config_json_loads_and_is_what_init_prints(self):
        text = read("config.json")
        config = plexus_lite.parse_config(plexus_lite.expand_variables(json.loads(text), {}))
        self.assertTrue(plexus_lite.model_list(config))
        self.assertTrue(plexus_lite.is_loopback(config.host))
        done = run_cli("init")
        self.assertEqual((done.returncode, done.stderr), (plexus_lite.EXIT_OK, ""))
        self.assertEqual(done.stdout, text)

    def test_help_names_every_key_and_every_option(self):
        text = help_text()
        for path, key in self.keys():
            with self.subTest(path):
                self.assertTrue(has_word(key, text) or f".{key} " in text)
        for option in OPTIONS:
            with self.subTest(option):
                self.assertTrue(has_word(option, text))

    def test_every_option_is_one_of_the_contract(self):
        found = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", help_text().partition("configuration keys")[0]))
        self.assertEqual(found, set(OPTIONS))

    def test_readme_names_every_key_and_every_option(self):
        text = read("README.md")
        self.assertIn(f"\n{plexus_lite.render_reference()}\n", text)
        for option in OPTIONS:
            with self.subTest(option):
                self.assertTrue(has_word(option, text))

    def test_readme_names_nothing_that_is_no_key(self):
        """What looks like a limit in the README is one: a renamed key leaves no trace."""
        known = {key for _, key in self.keys()}
        for word in set(re.findall(r"`([a-z0-9_]+_(?:s|bytes|timeout_s|connections))`", read("README.md"))):
            with self.subTest(word):
                self.assertIn(word, known)

    def test_json_of_the_readme_is_json(self):
        blocks = re.findall(r"^```json\n(.*?)^```", read("README.md"), re.MULTILINE | re.DOTALL)
        self.assertGreater(len(blocks), 1)
        for block in blocks:
            with self.subTest(block[:60]):
                value = json.loads(block)
                if "api_base_url" in block:  # the others are a client's, or a line of the log
                    names = re.findall(r"\$\{(\w+)\}", block)
                    variables = {name: "sk-" + name for name in names}
                    plexus_lite.parse_config(plexus_lite.expand_variables(value, variables))

    def test_the_licence_is_named_in_the_file_and_the_readme(self):
        for name, text in (("plexus_lite.py", plexus_lite.__doc__ or ""), ("README.md", read("README.md"))):
            with self.subTest(name):
                self.assertRegex(text, r"\bMIT\b")
        self.assertIn("Copyright", plexus_lite.__doc__ or "")

    def test_version(self):
        self.assertRegex(plexus_lite.__version__, r"\A[0-9]+\.[0-9]+\.[0-9]+\Z")
        done = run_cli("--version")
        self.assertEqual((done.returncode, done.stderr), (plexus_lite.EXIT_OK, ""))
        self.assertEqual(done.stdout, f"plexus_lite {plexus_lite.__version__}\n")
        self.assertTrue(has_word(plexus_lite.__version__, read("README.md")))

    def test_exit_codes_are_the_contract_s(self):
        found = (plexus_lite.EXIT_OK, plexus_lite.EXIT_CHECK_FAILED, plexus_lite.EXIT_USAGE)
        self.assertEqual((*found, plexus_lite.EXIT_CANNOT_LISTEN), (0, 1, 2, 3))

    def test_files_are_plain_text(self):
        for path in ("plexus_lite.py", "config.json"):
            with self.subTest(path):
                text = read(path)
                self.assertTrue(text.isascii())
                self.assertNotRegex(text, r"[\t\r\f\v]| \n")
                self.assertRegex(text, r"[^\n]\n\Z")


if __name__ == "__main__":
    unittest.main()
