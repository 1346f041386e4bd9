"""Conversion between a run's ConfigDict and the frozen dataclasses that the code works with.

Each room declares its settings as a frozen dataclass of int, float, bool, str, tuple and nested
dataclasses, with a default for every field. `as_config_dict` turns it into the ConfigDict that a
config file edits and `--config.a.b=c` overrides. `build` turns the edited ConfigDict back, and is
strict: an unknown key, a wrong type or a value out of range is a ConfigError before anything is
allocated.
"""

import dataclasses
import difflib
import os
import pathlib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

UNIONS = (typing.Union, types.UnionType)
LONGEST_NAME = 255   # bytes of a name in a path, on all usual file systems
# {key of an earlier version: its name now}; files of earlier versions are read under the new names.
RENAMED = {'config.steps_per_dispatch': 'config.steps_per_call'}


class ConfigError(ValueError):
  """A setting that cannot work; the message names it and the fix, usually in one line."""


def fail(key: str, given: Any, allowed: Any, fix: str) -> typing.NoReturn:
  """Raises ConfigError with the key, the given value, what is allowed, and the fix."""
  raise ConfigError(f'{key}: got {given!r}, allowed: {allowed}. {fix}')


def check(ok: bool, key: str, given: Any, allowed: Any, fix: str) -> None:
  """Raises ConfigError, as `fail` does, unless ok."""
  if not ok:
    fail(key, given, allowed, fix)


def check_choice(key: str, given: Any, choices: Iterable[Any]) -> None:
  """Raises ConfigError, with the nearest choice, unless given is one of choices."""
  choices = list(choices)
  if given in choices:
    return
  near = nearest(str(given), [str(c) for c in choices])
  fix = f'Did you mean {near!r}?' if near else 'Choose one of these.'
  fail(key, given, ', '.join(map(str, choices)), fix)


def nearest(word: str, words: Iterable[str]) -> str | None:
  """The one of words that is closest to a misspelt word, or None."""
  close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
  return close[0] if close else None


def path(key: str, given: str | os.PathLike) -> pathlib.Path:
  """Returns the path that a setting names, with '~' expanded.

  Raises:
    ConfigError: no file can have this name: it is no text, or a part of it is too long.
  """
  text = os.path.expanduser(os.fspath(given))
  try:
    longest = max(len(part.encode()) for part in text.split(os.sep))
  except UnicodeEncodeError:
    fail(key, text, 'a path in UTF-8', 'Rename the file.')
  check(longest <= LONGEST_NAME and '\0' not in text, key, text,
        f'a path whose names have at most {LONGEST_NAME} bytes each', 'Give a shorter name.')
  return pathlib.Path(text)


def unknown_key(key: str, known: Iterable[str]) -> ConfigError:
  """The error for a key that does not exist; `known` are the keys beside it."""
  if key in RENAMED:
    return ConfigError(f'{key}: is called {RENAMED[key]} now.')
  parent, _, name = key.rpartition('.')
  known = sorted(known)
  near = nearest(name, known)
  hint = f'did you mean {near!r}? ' if near else ''
  return ConfigError(f'{key}: no such key; {hint}Known keys{f" in {parent}" if parent else ""}: '
                     + ', '.join(known))


def renamed(values: Mapping[str, Any], where: str = 'config') -> dict[str, Any]:
  """The nested settings of a run of an earlier version, under the keys of this version.

  A key that is renamed stays in its group.
  """
  result = {}
  for name, value in values.items():
    key = f'{where}.{name}'
    name = RENAMED.get(key, key).rpartition('.')[2]
    result[name] = renamed(value, key) if isinstance(value, Mapping) else value
  return result


def as_config_dict(settings: Any) -> ConfigDict:
  """Dataclass instance -> ConfigDict of all keys, nested ones too, for a config file to edit."""
  def convert(value):
    if dataclasses.is_dataclass(value):
      return ConfigDict({f.name: convert(getattr(value, f.name))
                         for f in dataclasses.fields(value) if f.init})
    return value
  return convert(settings)


def build(cls: type, values: Mapping[str, Any], where: str = 'config') -> Any:
  """ConfigDict -> instance of the frozen dataclass `cls`; missing keys take their defaults.

  Args:
    cls: frozen dataclass. In a field that is a union of dataclasses, the value of `family` (the
      first field of each) chooses among them.
    values: {field: value}, nested like cls.
    where: dotted path of `values`, for messages.

  Raises:
    ConfigError: a key is unknown (the message has the nearest known one), a value is of a wrong
      type, or __post_init__ of a dataclass refuses it.
  """
  if not isinstance(values, Mapping | ConfigDict):
    fail(where, values, 'a group of keys', f'Set keys inside it, as in {where}.key=value.')
  hints = typing.get_type_hints(cls)
  known = {f.name for f in dataclasses.fields(cls) if f.init}
  for key in values:
    if key not in known:
      raise unknown_key(f'{where}.{key}', known)
  kwargs = {k: _convert(hints[k], values[k], f'{where}.{k}') for k in known if k in values}
  try:
    return cls(**kwargs)
  except ConfigError as error:   # a room names its own keys, without their path in a run
    raise ConfigError(_full_key(str(error), where, known)) from None


def _full_key(message: str, where: str, known: set[str]) -> str:
  """The message 'moe.k: got 9, ...' with the full key: 'config.model.moe.k: got 9, ...'."""
  key, colon, rest = message.partition(':')
  parent, _, room = where.rpartition('.')
  if key.startswith(f'{room}.') and parent:
    key = f'{parent}.{key}'
  elif not key.startswith('config.') and key.rpartition('.')[2] in known:
    key = f'{where}.{key.rpartition(".")[2]}'
  return f'{key}{colon}{rest}'


def _convert(hint: Any, value: Any, where: str) -> Any:
  """value as the annotated type `hint`. Raises ConfigError if it is of another type."""
  options = typing.get_args(hint) if typing.get_origin(hint) in UNIONS else ()
  if options:   # a union of dataclasses
    by_family = {dataclasses.fields(o)[0].default: o for o in options}
    family = _value(value, 'family', where)
    check_choice(f'{where}.family', family, by_family)
    return build(by_family[family], value, where)
  if dataclasses.is_dataclass(hint):
    return build(hint, value, where)
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if hint is tuple or typing.get_origin(hint) is tuple:
    if isinstance(value, list | tuple):
      return tuple(value)
  elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
    return value
  name = 'tuple' if typing.get_origin(hint) is tuple else getattr(hint, '__name__', str(hint))
  fail(where, value, f'a value of type {name}',
       f'A {type(value).__name__} was given; set {where} to a {name}.')


def _value(value: Any, key: str, where: str) -> Any:
  """value[key]. Raises ConfigError if it is missing."""
  if not isinstance(value, Mapping | ConfigDict) or key not in value:
    raise ConfigError(f'{where}.{key}: missing, and it decides which other keys {where} has')
  return value[key]
