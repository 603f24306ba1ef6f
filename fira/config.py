"""Typed, frozen configuration: a preset file plus dotted overrides, checked in one place.

A component declares its settings beside its code as a `Config` subclass; a stage composes them into
one schema. Every mistake a user can make here ends as one `ConfigError` line with value, rule and
remedy.
"""
from __future__ import annotations

import difflib
import json
import sys
import typing
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class ConfigError(ValueError):
    """A setting the user can correct; the command line shows the line and exits with 2."""


class Config(BaseModel):
    """Base of every settings class: immutable, no unknown keys, no silent type conversion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=(),
                              allow_inf_nan=False)


def parse(schema: type[Config], data: dict[str, Any]) -> Any:
    """Check `data` against `schema`. Raises ConfigError, one line, for the first mistake."""
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(schema, error.errors()[0])) from None


def preset_names() -> list[str]:
    """Names of the presets that travel with the package."""
    files = resources.files("fira.presets").iterdir()
    return sorted(file.name[:-5] for file in files if file.name.endswith(".toml"))


def load_preset(name: str) -> dict[str, Any]:
    """Read a preset by name, or from a path ending in .toml, as nested plain data."""
    if name.endswith(".toml"):
        if not Path(name).is_file():
            raise ConfigError(f"preset file {name} does not exist; give a .toml file or one of: "
                              f"{', '.join(preset_names())}")
        content = Path(name).read_bytes()
    elif name in preset_names():
        content = resources.files("fira.presets").joinpath(f"{name}.toml").read_bytes()
    else:
        close = difflib.get_close_matches(name, preset_names(), n=1, cutoff=0.5)
        raise ConfigError(f"unknown preset {name!r}{f'; did you mean {close[0]}?' if close else ''}"
                          f"; presets: {', '.join(preset_names())}")
    try:
        return tomllib.loads(content.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"preset {name} is not valid TOML ({error}); correct it there, or copy "
                          "one that travels with fira") from None


def override(data: dict[str, Any], settings: typing.Iterable[str]) -> dict[str, Any]:
    """Return a copy of nested `data` with `section.key=value` settings laid over it.

    Values are read as JSON (1e-3, true, null, [1, 2]); anything else is taken as text.
    """
    result = json.loads(json.dumps(data))
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise ConfigError(f"{setting!r} is not an override; write section.key=value, "
                              "for example train.steps=500")
        *sections, leaf = key.split(".")
        place = result
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{key}: {section} is a value, not a section; "
                                  "write section.key=value")
        place[leaf] = _value(text)
    return result


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key -> value, in declaration order."""
    rows: dict[str, Any] = {}
    for name, value in config:
        if isinstance(value, Config):
            rows.update({f"{name}.{key}": inner for key, inner in flatten(value).items()})
        else:
            rows[name] = value
    return rows


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _keys(schema: Any) -> list[str]:
    """Every dotted key a schema accepts, through nested sections and unions of them."""
    return [name for name, field in _fields(schema) if not any(_fields(field.annotation))]


def _nearest_key(schema: type[Config], key: str) -> str:
    """The key spelled most alike, by its name or by what it means (learning_rate is lr)."""
    known = set(_keys(schema))
    spelled = {}
    for name, field in _fields(schema):
        if name in known and name != key:
            section = name.rpartition(".")[0]
            spelled[f"{section}.{'_'.join((field.description or '').split())}"] = name
            spelled[name] = name
    close = difflib.get_close_matches(key, spelled, n=1, cutoff=0.5)
    return f"did you mean {spelled[close[0]]}? " if close else ""


def _explain(schema: type[Config], error: Any) -> str:
    """One line for one pydantic error: the key, the value, the rule, what to write instead."""
    keys = _keys(schema)
    parts = [str(part) for part in error["loc"]]
    key = ".".join(parts)
    if len(parts) > 2 and ".".join(parts[:2]) not in keys:  # a tagged union adds its tag
        key = ".".join(parts[:1] + parts[2:])
    if error["type"] == "extra_forbidden":
        return (f"unknown key {key}; {_nearest_key(schema, key)}fira train PRESET --dry-run "
                "lists every key")
    if error["type"] == "missing":
        return f"{key} is missing; give it in the preset or as {key}=VALUE"
    if error["type"].startswith("union_tag"):
        tags = error["ctx"].get("expected_tags", "'fira', 'fira2'")
        return f"{key}.architecture must be one of {tags}"
    rule = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if error["type"] == "value_error":  # our validators already write value, rule and remedy
        section = ".".join(parts[:1])
        return f"{section}: {rule}" if section and section not in rule else rule
    given = error["input"] if not isinstance(error["input"], (dict, list)) else "that value"
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{key}={given}: {key} is a section; write {key}.KEY=VALUE"
    return f"{key}={given}: {rule}{_remedy(schema, key)}"


def _remedy(schema: type[Config], key: str) -> str:
    """What to write instead: the field's meaning and, where there is one, its default."""
    for name, field in _fields(schema):
        if name == key:
            meaning = f" ({field.description})" if field.description else ""
            default = ("" if field.is_required() or field.default is None
                       else f"; the default is {key}={field.default}")
            return meaning + default
    return ""


def _fields(schema: Any, prefix: str = "") -> typing.Iterator[tuple[str, Any]]:
    """The dotted name and the field of every section and every key, as `_keys` finds them."""
    if isinstance(schema, type) and issubclass(schema, Config):
        for name, field in schema.model_fields.items():
            yield prefix + name, field
            yield from _fields(field.annotation, f"{prefix}{name}.")
    else:
        for part in typing.get_args(schema):
            yield from _fields(part, prefix)
