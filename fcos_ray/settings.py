"""Settings: one definition gives TOML keys, environment variables, flags, --help and the words for what is wrong.

Precedence: flag, then `<PREFIX><NAME>` in the environment, then the TOML file of --config, then the default. Knows
pydantic, not which settings there are.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from fcos_ray.errors import ConfigError

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9A-Fa-f]{64}$")]
Triple = tuple[float, float, float]


class Settings(BaseModel):
    """Frozen, validated settings. Raises ConfigError: which setting, what was wanted, what came."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_explain(error, type(self))) from error


S = TypeVar("S", bound=Settings)


class _HelpFormatter(argparse.HelpFormatter):
    """Without the defaults that say nothing: null, [] and {}."""

    def _expand_help(self, action: argparse.Action) -> str:
        return re.sub(r" \(default: (null|\[\]|\{\})\)$", "", super()._expand_help(action))


def load_settings(settings: type[S], arguments: list[str], *, program: str, env_prefix: str) -> S:
    """The settings of a command line, with environment and TOML behind it. Raises ConfigError; --help exits with 0."""
    toml_file = _config_file(arguments, env_prefix)

    class Outside(settings, BaseSettings):  # type: ignore[misc, valid-type]
        __doc__ = settings.__doc__
        model_config = SettingsConfigDict(
            frozen=True,
            extra="forbid",
            env_prefix=env_prefix,
            toml_file=toml_file,
            cli_prog_name=program,
            cli_kebab_case=True,
            cli_implicit_flags=True,
            cli_hide_none_type=True,
            cli_exit_on_error=False,
        )
        config: Path | None = Field(None, description="TOML file with any of these settings (underscores for dashes)")

        def __init__(self, **values: Any) -> None:
            BaseSettings.__init__(self, **values)

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the base class names it
            file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            """After the flags: the environment, then the file."""
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    flags: CliSettingsSource[Any] = CliSettingsSource(Outside, formatter_class=_HelpFormatter)
    try:
        outside = CliApp.run(Outside, cli_args=arguments, cli_settings_source=flags)
    except ValidationError as error:
        raise ConfigError(_explain(error, Outside)) from error
    except SettingsError as error:
        raise ConfigError(_explain_flags(str(error), arguments, Outside, env_prefix)) from error
    return settings(**outside.model_dump(exclude={"config"}))


def settings_table(settings: type[Settings]) -> str:
    """A Markdown table of every setting: TOML name, default, meaning, and the range where there is one."""
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for name, field in settings.model_fields.items():
        default = "required" if field.is_required() else _spelled(field.get_default(call_default_factory=True))
        meaning = f"{field.description or ''}{_range(settings, name)}"
        lines.append(f"| `{name}` | {default} | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def _spelled(value: object) -> str:
    if value is None or value in ([], {}):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return str(value)


def _range(settings: type[Settings], name: str) -> str:
    """What JSON schema says of a setting's values: choices, and numbers from and to."""
    said = settings.model_json_schema()["properties"][name]
    [kind] = [kind for kind in said.get("anyOf", [said]) if kind.get("type") != "null"]
    if "enum" in kind:
        return f". One of {', '.join(map(str, kind['enum']))}"
    low, above = kind.get("minimum"), kind.get("exclusiveMinimum")
    high = kind.get("maximum")
    if high is not None:
        return f". {low if low is not None else above:g} to {high:,g}"
    if above == 0 and kind.get("type") == "number":
        return ". Above 0"
    return ""


def _config_file(arguments: list[str], env_prefix: str) -> Path | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", type=Path, default=os.environ.get(f"{env_prefix}CONFIG"))
    try:
        path: Path | None = parser.parse_known_args(arguments)[0].config
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    if path is None:
        return None
    try:
        tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not TOML: {error}") from error
    return path


def _explain(error: ValidationError, settings: type[BaseModel]) -> str:
    lines = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"]).split(".")[0]
        if problem["type"] == "extra_forbidden":
            lines.append(_unknown(name, settings))
        elif problem["type"] == "missing" and len(problem["loc"]) == 1:
            field = settings.model_fields[name]
            lines.append(f"{name} is missing: {field.description} (--{name.replace('_', '-')}, or {name} = … in TOML)")
        else:
            message = re.sub(r"^(Value error,|Input|String|List) ", "", problem["msg"])
            if problem["type"] == "missing":  # within a setting that holds several values
                message = "has too few values"
            lines.append(f"{name} {message}, got {_shown(problem['input'])}" if name else message)
    return "; ".join(dict.fromkeys(lines))


def _explain_flags(message: str, arguments: list[str], settings: type[BaseModel], env_prefix: str) -> str:
    known = {f"--{name.replace('_', '-')}" for name in settings.model_fields}
    for argument in arguments:
        flag = argument.split("=")[0]
        if flag.startswith("--") and flag not in known and flag.replace("--no-", "--", 1) not in known:
            return _unknown(flag.removeprefix("--"), settings, flag=True)
    if found := re.search(r"Parsing error encountered for (\w+)", message):
        shape = "old=new" if found[1] == "rename" else "values with commas between, or a JSON list"
        return f"--{found[1].replace('_', '-')} wants {shape}"
    if found := re.search(r'value for field "(\w+)" from source "EnvSettingsSource"', message):
        name = f"{env_prefix}{found[1].upper()}"
        shape = '{"old": "new"}' if found[1] == "rename" else '["a", "b"]'
        return f"{name} wants JSON such as {shape}, got {_shown(os.environ.get(name))}"
    return _without_secrets(message.removeprefix("error parsing CLI: "))


def _shown(value: object) -> str:
    return repr(_without_secrets(value)) if isinstance(value, str) else _without_secrets(repr(value))


def _without_secrets(text: str) -> str:
    """A uri may stand in the wrong place, with its password."""
    from fcos_ray.storage import cut_secrets  # with s3fs, which --help need not wait for

    return cut_secrets(text)


def _unknown(name: str, settings: type[BaseModel], *, flag: bool = False) -> str:
    """Words for a setting that is not there; `name` as it was written, without the dashes before a flag."""
    known = [field.replace("_", "-") if flag else field for field in settings.model_fields]
    dashes = "--" if flag else ""
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {dashes}{nearest[0]}?" if nearest else "; --help lists the settings"
    return f"there is no setting {dashes}{name}{hint}"
