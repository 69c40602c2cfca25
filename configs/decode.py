"""From a plain TOML table to a JobConfig: finds everything that is wrong at once, not one thing at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import msgspec

from configs.errors import Problem, alternatives, did_you_mean
from configs.schema import JobConfig

_LARGEST = 2**63 - 1
_S = TypeVar("_S", bound=msgspec.Struct)


def decode(table: Mapping[str, object]) -> JobConfig | list[Problem]:
    """The configuration, or every unknown, missing or ill-typed key of the table (sources are left empty)."""
    return decode_as(table, JobConfig)


def decode_as(table: Mapping[str, object], struct: type[_S]) -> _S | list[Problem]:
    """The same for any other struct of plain sections."""
    problems = _struct_problems(table, struct, "")
    return problems or msgspec.convert(table, struct)


def field_type(key: str) -> Any:
    """The declared type of `section.key`, or None when there is no such key."""
    section, _, name = key.partition(".")
    sections = {field.name: field.type for field in msgspec.structs.fields(JobConfig)}
    if section not in sections or not name:
        return None
    return {field.name: field.type for field in msgspec.structs.fields(sections[section])}.get(name)


def plain_type(declared: Any) -> Any:
    """The type without its bounds: int for `Annotated[int, ...]`."""
    return get_args(declared)[0] if get_origin(declared) is Annotated else declared


def unknown_key(key: str) -> str:
    """What to say of a `section.key` (or a section) that the schema lacks."""
    sections = {field.name: field.type for field in msgspec.structs.fields(JobConfig)}
    section, _, name = key.partition(".")
    if section not in sections:
        if homes := _sections_with(name or section):
            return f"there is no section [{section}]; did you mean {homes[0]}.{name or section}?"
        near = did_you_mean(section, sections)
        hint = f"; did you mean [{near}]?" if near else "; remove it"
        return f"there is no section [{section}] (there are {', '.join(sections)}){hint}"
    names = [field.name for field in msgspec.structs.fields(sections[section])]
    if not name:
        return f"is a section; name one of its keys: {', '.join(f'{section}.{each}' for each in names)}"
    if "." in name:
        return f"keys have the form section.key; give {section}.{name.partition('.')[0]} as a whole"
    near = did_you_mean(name, names)
    guess = [f"{section}.{near}"] if near else [f"{home}.{name}" for home in _sections_with(name)]
    hint = f"; did you mean {guess[0]}?" if guess else "; remove it"
    return f"[{section}] has no such key (it has {', '.join(names)}){hint}"


def _sections_with(name: str) -> list[str]:
    return [
        section.name
        for section in msgspec.structs.fields(JobConfig)
        if name in [field.name for field in msgspec.structs.fields(section.type)]
    ]


def _struct_problems(table: Mapping[str, object], struct: type[msgspec.Struct], prefix: str) -> list[Problem]:
    fields = {field.name: field for field in msgspec.structs.fields(struct)}
    problems = []
    for name, value in table.items():
        key = prefix + name
        if name in fields:
            problems += _value_problems(value, fields[name].type, key)
        else:
            problems.append(Problem(key, _scalar(value), _unknown_in(struct, key, name)))
    for name, field in fields.items():
        if field.required and name not in table:
            problems += _missing(prefix + name, field.type)
    return problems


def _scalar(value: object) -> object:
    """A table's content says nothing about why its name is wrong."""
    return None if isinstance(value, Mapping) else value


def _unknown_in(struct: type[msgspec.Struct], key: str, name: str) -> str:
    if "[" in key or not _of_a_job(struct):
        names = [field.name for field in msgspec.structs.fields(struct)]
        return f"there is no such key{alternatives(name, names, 'there are')}"
    return unknown_key(key)


def _of_a_job(struct: type[msgspec.Struct]) -> bool:
    return struct is JobConfig or struct in {field.type for field in msgspec.structs.fields(JobConfig)}


def _missing(key: str, declared: Any) -> list[Problem]:
    if _is_struct(declared):
        return [
            problem
            for field in msgspec.structs.fields(declared)
            if field.required
            for problem in _missing(f"{key}.{field.name}", field.type)
        ]
    table, _, name = key.rpartition(".")
    header = f"[[{table.partition('[')[0]}]]" if "[" in table else f"[{table}]"
    return [Problem(key, None, f"missing; add {name} = ... ({expected(declared)}) below {header}")]


def _value_problems(value: object, declared: Any, key: str) -> list[Problem]:
    if _is_struct(declared):
        if not isinstance(value, Mapping):
            return [Problem(key, value, f"must be a section; write [{key}] on a line of its own and its keys below")]
        return _struct_problems(value, declared, key + ".")
    if get_origin(declared) is tuple and isinstance(value, list):
        return [
            problem
            for index, item in enumerate(value)
            for problem in _value_problems(item, get_args(declared)[0], f"{key}[{index}]")
        ]
    choices = get_args(declared) if get_origin(declared) is Literal else ()
    if choices and isinstance(value, str) and value not in choices:
        return [Problem(key, value, f"there is no such choice{alternatives(value, choices)}")]
    try:
        converted = msgspec.convert(value, declared)
    except msgspec.ValidationError:
        return [Problem(key, value, f"must be {expected(declared)}, but is {_kind(value)}")]
    if isinstance(converted, float) and not math.isfinite(converted):
        return [Problem(key, value, f"must be finite; give {expected(declared)}")]
    if isinstance(converted, int) and converted > _LARGEST:
        return [Problem(key, value, f"does not fit in 64 bits; give {expected(declared)}")]
    return []


def _is_struct(declared: Any) -> bool:
    return isinstance(declared, type) and issubclass(declared, msgspec.Struct)


def expected(declared: Any) -> str:
    """What a value of this type looks like, in words: `a whole number, 1 or more`."""
    if get_origin(declared) is Annotated:
        base, *marks = get_args(declared)
        bounds = [_bounds(mark) for mark in marks if isinstance(mark, msgspec.Meta)]
        return ", ".join([expected(base), *bounds])
    if get_origin(declared) is Literal:
        return "one of " + ", ".join(get_args(declared))
    if get_origin(declared) is tuple:
        item = get_args(declared)[0]
        if item is str:
            return "a list of texts in quotes"
        if get_origin(item) is Literal:
            return "a list of some of " + ", ".join(get_args(item))
        return f"a list of tables with {', '.join(field.name for field in msgspec.structs.fields(item))}"
    if get_origin(declared) is dict:
        return "a table of texts in quotes"
    if _is_struct(declared):
        return f"a table with {', '.join(field.name for field in msgspec.structs.fields(declared))}"
    return {str: 'text in quotes ("...")', int: "a whole number", float: "a number", bool: "true or false"}[declared]


def _bounds(meta: msgspec.Meta) -> str:
    if meta.ge is not None and meta.le is not None:
        return f"between {meta.ge} and {meta.le}"
    assert meta.le is None, f"no words for {meta}"
    assert meta.ge is not None or meta.gt is not None, f"no words for {meta}"
    least = f"{meta.ge} or more" if meta.ge is not None else f"more than {meta.gt}"
    return least if meta.lt is None else f"{least} and below {meta.lt}"


def _kind(value: object) -> str:
    words = {str: "text", bool: "a boolean", int: "a whole number", float: "a number", list: "a list", dict: "a table"}
    kind = words.get(type(value), f"a {type(value).__name__}")
    return kind if isinstance(value, bool | str | list | dict) else f"{value}"
