"""Manifests as YAML in which every text is a text, whichever parser reads it. The one import site of PyYAML."""

from __future__ import annotations

import re
from typing import Any

import yaml

# All else is quoted: parsers of YAML disagree about `on`, `1e3`, `0o7`, `1:30` and more.
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")
_WORDS = frozenset(("y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf"))


class _Dumper(yaml.SafeDumper):
    """Quotes texts, and writes those of several lines as a block."""

    def ignore_aliases(self, data: Any) -> bool:
        """Everything is written out where it stands."""
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Lists are indented in what they belong to."""
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    quoted = "|" if "\n" in text else '"'
    plain = _PLAIN.fullmatch(text) and text.lower() not in _WORDS
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else quoted)


_Dumper.add_representer(str, _text)


def to_yaml(manifest: dict[str, Any]) -> str:
    """One document, keys in the order in which they were put."""
    return yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=10**9)
