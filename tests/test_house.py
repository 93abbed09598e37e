"""The rules of the house that a program can see."""

import ast
import re
from pathlib import Path

import pytest

from server.__main__ import PLUGINS
from server.api import Kind
from server.config import DEFAULT_FILE
from server.errors import Code
from server.openapi import describe
from server.plugin import Plugin

ROOT = Path(__file__).parent.parent
SOURCES = [path for room in ("server", "phones", "plugins") for path in sorted((ROOT / room).rglob("*.py"))]
DOORS = {
    "asyncpg": {"server/pg.py"},
    "aioboto3": {"server/storage.py"},
    "aiodocker": {"phones/engine.py"},
    "pyaxmlparser": {"phones/apk.py"},
}


def name_of(path: Path) -> str:
    """The file's path in the repository."""
    return path.relative_to(ROOT).as_posix()


def tables_made_by(plugin: Plugin) -> set[str]:
    """The tables a plugin's migrations make."""
    return set(re.findall(r"CREATE TABLE (?:IF NOT EXISTS )?(\w+)", "\n".join(plugin.migrations)))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_each_outside_library_has_one_door(path: Path) -> None:
    imported = {
        (node.module or "").partition(".")[0]
        if isinstance(node, ast.ImportFrom)
        else alias.name.partition(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    for library, doors in DOORS.items():
        assert library not in imported or name_of(path) in doors, f"{library} belongs into {doors}"


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: plugin.name)
def test_sql_names_only_the_plugins_own_tables(plugin: Plugin) -> None:
    others = {table for other in PLUGINS if other is not plugin for table in tables_made_by(other)}
    own = [path for path in SOURCES if name_of(path).startswith(f"plugins/{plugin.name}")]
    assert own
    for path in own:
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                continue
            statement = re.sub(r"REFERENCES \w+", "", node.value)
            used = set(re.findall(r"\b(?:FROM|JOIN|INTO|UPDATE|TABLE)\s+(\w+)", statement))
            assert not used & others, f"{name_of(path)}:{node.lineno} names another plugin's table"


def test_every_operation_says_what_it_is_for() -> None:
    for plugin in PLUGINS:
        for route in plugin.routes:
            assert route.summary, f"{route.operation} has no docstring"
            assert route.tag == plugin.name


def test_every_operation_has_its_own_name() -> None:
    names = [route.operation for plugin in PLUGINS for route in plugin.routes if route.kind is not Kind.PAGE]
    assert len(names) == len(set(names))


def test_nothing_that_changes_state_is_a_get() -> None:
    for plugin in PLUGINS:
        for route in plugin.routes:
            assert route.kind is not Kind.SOCKET or route.method == "GET"
            assert route.body is None or route.method != "GET"


def test_the_description_covers_every_api_route() -> None:
    routes = [route for plugin in PLUGINS for route in plugin.routes]
    paths = describe(routes, "test")["paths"]
    for route in routes:
        if route.kind is not Kind.PAGE:
            assert route.method.lower() in paths[route.path]


def test_every_code_is_raised_somewhere() -> None:
    text = "\n".join(path.read_text() for path in SOURCES)
    unused = [code.name for code in Code if f"Code.{code.name}" not in text]
    assert not unused


def test_every_configuration_key_is_in_the_shipped_file() -> None:
    text = DEFAULT_FILE.read_text()
    for plugin in PLUGINS:
        assert f"[{plugin.name}]" in text
        for key in plugin.config.model_fields:
            assert re.search(rf"^(\[+{plugin.name}\.)?{key}\b", text, re.MULTILINE), f"{plugin.name}.{key}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_public_names_are_documented(path: Path) -> None:
    tree = ast.parse(path.read_text())
    if path.name == "__init__.py" and not tree.body:
        return
    assert ast.get_docstring(tree), f"{name_of(path)} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_":
            assert ast.get_docstring(node), f"{name_of(path)}:{node.lineno} {node.name} has no docstring"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_time_and_chance_come_through_their_door(path: Path) -> None:
    if name_of(path) == "server/clock.py" or not name_of(path).startswith(("server", "plugins")):
        return
    text = path.read_text()
    assert not re.search(r"\b(time\.time|time\.monotonic|datetime\.now|uuid4|random\.)\b", text)


def test_lock_files_name_no_host() -> None:
    for lock in ROOT.glob("requirements*.lock"):
        assert "://" not in lock.read_text()
