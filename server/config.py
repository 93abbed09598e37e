"""config.toml and the environment → frozen typed sections; whatever is wrong is one line."""

import os
import tomllib
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from server.plugin import Plugin, Section

PREFIX = "CLOUDPHONE_"
DEFAULT_FILE = Path(__file__).parent.parent / "config.toml"


class ConfigFault(Exception):
    """The configuration cannot be used; the text is one line naming file, key and expectation."""


class ServerSection(Section):
    """[server]"""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    data_dir: Path = Path("data")
    public_url: str = ""
    trusted_proxies: tuple[IPv4Network | IPv6Network, ...] = ()
    shutdown_grace_s: Annotated[float, Field(gt=0, le=600)] = 20
    secret_key: str = ""


class DatabaseSection(Section):
    """[database]"""

    url: Annotated[str, Field(pattern=r"^$|^postgres(ql)?://")] = ""


class StorageSection(Section):
    """[storage]"""

    endpoint_url: Annotated[str, Field(pattern=r"^$|^https?://")] = ""
    bucket: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")] = "cloudphone"
    access_key: str = ""
    secret_key: str = ""
    region: str = "us-east-1"


class Configuration(BaseModel):
    """All sections. A plugin's section is asked for by its name."""

    model_config = ConfigDict(frozen=True, extra="allow")

    server: ServerSection
    database: DatabaseSection
    storage: StorageSection

    def section(self, name: str) -> Section:
        """A plugin's section."""
        section = getattr(self, name)
        assert isinstance(section, Section)
        return section


def load(file: Path | None, plugins: tuple[Plugin, ...]) -> Configuration:
    """Read and check the configuration. Raises ConfigFault."""
    path = file or DEFAULT_FILE
    if not path.is_file():
        raise ConfigFault(f"{path}: there is no such file")
    sections: dict[str, type[Section]] = {
        "server": ServerSection,
        "database": DatabaseSection,
        "storage": StorageSection,
        **{plugin.name: plugin.config for plugin in plugins},
    }
    _refuse_unknown_variables(sections)
    settings = _settings_model(path, sections)
    try:
        values = settings()
    except tomllib.TOMLDecodeError as error:
        raise ConfigFault(f"{path}: not valid TOML: {error}") from None
    except ValidationError as error:
        raise ConfigFault(_first_line(path, error)) from None
    except Exception as error:
        raise ConfigFault(f"{path}: {' '.join(str(error).split())}") from None
    found = {name: getattr(values, name) for name in sections}
    server: ServerSection = found["server"]
    found["server"] = server.model_copy(update={"data_dir": (path.parent / server.data_dir).resolve()})
    return Configuration.model_construct(**found)


def _settings_model(path: Path, sections: Mapping[str, type[Section]]) -> type[BaseSettings]:
    class Settings(BaseSettings):
        model_config = SettingsConfigDict(
            extra="forbid", env_prefix=PREFIX, env_nested_delimiter="__", toml_file=path, frozen=True
        )

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return env_settings, TomlConfigSettingsSource(settings_cls)

    fields: dict[str, Any] = {
        name: (section, Field(default_factory=section)) for name, section in sections.items()
    }
    return create_model("Settings", __base__=Settings, **fields)


def _refuse_unknown_variables(sections: Mapping[str, type[Section]]) -> None:
    for variable in os.environ:
        if not variable.startswith(PREFIX):
            continue
        section = variable.removeprefix(PREFIX).partition("__")[0].lower()
        if section not in sections:
            raise ConfigFault(f"environment: {variable}: there is no section [{section}]")


def _first_line(path: Path, error: ValidationError) -> str:
    first = error.errors(include_input=False, include_url=False)[0]
    key = ".".join(map(str, first["loc"]))
    variable = PREFIX + "__".join(str(part).upper() for part in first["loc"])
    source = f"environment variable {variable}" if variable in os.environ else str(path)
    expected = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
    return f"{source}: {key}: {expected}"
