"""config.toml and the environment: what is wrong is one line, and nothing is guessed."""

import tomllib
from pathlib import Path

import pytest

from server.__main__ import PLUGINS, main
from server.config import DEFAULT_FILE, ConfigFault, load


def written(folder: Path, text: str) -> Path:
    """A configuration file with this text."""
    file = folder / "config.toml"
    file.write_text(text)
    return file


def test_the_shipped_file_names_every_default(tmp_path: Path) -> None:
    shipped = load(None, PLUGINS)
    empty = load(written(tmp_path, ""), PLUGINS)
    for name in tomllib.loads(DEFAULT_FILE.read_text()):
        shipped_section = getattr(shipped, name).model_dump(exclude={"data_dir"})
        assert shipped_section == getattr(empty, name).model_dump(exclude={"data_dir"}), name
        assert set(shipped_section) | {"data_dir"} >= set(tomllib.loads(DEFAULT_FILE.read_text())[name])


def test_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUDPHONE_SERVER__PORT", "9999")
    monkeypatch.setenv("CLOUDPHONE_DEVICES__ADB_PORTS", "[30000, 30009]")
    monkeypatch.setenv("CLOUDPHONE_BILLING__PROVIDERS__SANDBOX__SECRET", "s3cret")
    configuration = load(written(tmp_path, "[server]\nport = 1\nhost = '127.0.0.2'"), PLUGINS)
    assert (configuration.server.port, configuration.server.host) == (9999, "127.0.0.2")
    assert tuple(configuration.section("devices").model_dump()["adb_ports"]) == (30000, 30009)
    assert "s3cret" in str(configuration.section("billing").model_dump_json())


def test_data_dir_is_relative_to_the_file(tmp_path: Path) -> None:
    configuration = load(written(tmp_path, "[server]\ndata_dir = 'here'"), PLUGINS)
    assert configuration.server.data_dir == tmp_path / "here"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[server]\nprot = 1", "server.prot: unknown key"),
        ("[nothing]\na = 1", "nothing: unknown key"),
        ("[server]\nport = 'x'", "server.port: "),
        ("[server]\nport = 70000", "server.port: "),
        ("[server]\nport = ", "not valid TOML"),
        ("[storage]\nbucket = 'NO'", "storage.bucket: "),
        ("[database]\nurl = 'mysql://x'", "database.url: "),
        ("[users]\nregistration = 'maybe'", "users.registration: "),
        ("[devices]\nadb_ports = [1, 2, 3]", "devices.adb_ports"),
        ("[devices]\nadb_ports = [25000, 24000]", "devices"),
        ("[devices]\nadb_ports = [22500, 22600]", "devices"),
        ("[devices]\nbind_address = '0.0.0.0'", "devices"),
        ("[billing]\ncurrency = 'yuan'", "billing.currency: "),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(ConfigFault) as fault:
        load(file, PLUGINS)
    assert said in str(fault.value)
    assert "\n" not in str(fault.value)
    assert str(file) in str(fault.value)


def test_a_variable_of_no_section_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUDPHONE_SEVRER__PORT", "1")
    with pytest.raises(ConfigFault, match="CLOUDPHONE_SEVRER__PORT"):
        load(written(tmp_path, ""), PLUGINS)


def test_a_wrong_variable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUDPHONE_SERVER__PORT", "many")
    with pytest.raises(ConfigFault, match="CLOUDPHONE_SERVER__PORT"):
        load(written(tmp_path, ""), PLUGINS)


def test_the_command_line_says_it_and_exits_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(written(tmp_path, "[server]\nprot = 1"))]) == 2
    assert main(["--config", str(tmp_path / "absent.toml")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "server.prot" in said[0]
