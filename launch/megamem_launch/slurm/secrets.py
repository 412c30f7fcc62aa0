"""What looks like a secret, by its name or by its value. Records that are kept with a run go through here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

REDACTED = "[redacted]"

_NAMES = re.compile(
    r"(?:^|_)(?:\w*TOKEN|SECRETS?|(?:API|ACCESS|PRIVATE|SECRET|SIGNING)?KEY|PASS|PASSWD|\w*PASSWORD|\w*PASSPHRASE|CREDENTIALS?|AUTH|COOKIE|SIGNATURE|DSN|PAT)(?:_|$)",
    re.IGNORECASE,
)
_HARMLESS = re.compile(r"(?:^|_)(?:TOKENIZERS?\w*|AUTH_SOCK)(?:_|$)|_(?:FILE|PATH|DIR|SOCK)$", re.IGNORECASE)

_URL = re.compile(r"(?<=://)[^\s/@:'\"]*:[^\s/@'\"]+(?=@)|(?<=://)[^\s/@:'\"]{16,}(?=@)")
"""User and password, or a token alone, before the host of an address."""
_VALUES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"  # GitHub, GitLab
    r"|sk-[\w-]{20,}|xox[abprs]-[\w-]{10,}|AIza[\w-]{30,}|ya29\.[\w-]{20,}"  # OpenAI and others, Slack, Google
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}"  # AWS
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"  # JSON web tokens
    r"|(?<=[Bb]earer )[\w.~+/-]{8,}=*"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.DOTALL,
)
_ASSIGNMENT = re.compile(r"(?<![\w.-])([\w.-]+)(=|:[ \t]*|[ \t]=[ \t])(['\"]?)([^\s'\",;)}\]]{4,})")
_MIN_KNOWN = 8
_EXPANSION = re.compile(r"\$\([^)]*\)|\$\{[^}]*\}|\$\w+|`[^`]*`")
_OPTION = re.compile(r"(?<!\S)--[\w-]+=")


def is_secret(name: str, value: str) -> bool:
    """Whether a variable should not be kept: its name says so, or its value has a known form."""
    named = bool(_NAMES.search(name)) and not _HARMLESS.search(name)
    return bool(value) and (named or redact_text(value) != value)


def redact_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Variables in alphabetical order; of a secret only the name stays, of an address with a password all but that."""
    kept = {}
    for name, value in sorted(variables.items()):
        named = bool(_NAMES.search(name)) and not _HARMLESS.search(name)
        kept[name] = REDACTED if named and value else redact_text(value)
    return kept


def redact_text(text: str, known: Mapping[str, str] | None = None) -> str:
    """``text`` without what has the form of a secret, is assigned to a secret's name, or is one of the secret variables of
    ``known``, such as the environment."""
    for name, value in (known or {}).items():
        if len(value) >= _MIN_KNOWN and _NAMES.search(name) and not _HARMLESS.search(name):
            text = text.replace(value, REDACTED)
    text = _VALUES.sub(REDACTED, _URL.sub(REDACTED, text))
    return _ASSIGNMENT.sub(_without_value, text)


def redact(value: Any) -> Any:
    """Plain data with every text in it redacted."""
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, Mapping):
        return {key: redact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [redact(item) for item in value]
    return value


def secret_settings(settings: Mapping[str, Any]) -> Iterator[str]:
    """Dotted names of the settings in plain data that hold what has the form of a secret, or are free options that are named
    as one, such as ``data.sources[0].options.token``."""
    return (where for where, name, value in _texts(settings, "") if _is_secret_setting(where, name, value))


def redact_override(text: str) -> str:
    """``section.setting=value`` without what :func:`secret_settings` would find."""
    name, _, value = text.partition("=")
    named = ".options." in name and is_secret(name.rpartition(".")[2], value)
    return f"{name}={REDACTED}" if named else redact_text(text)


def holds_secret(line: str) -> bool:
    """Whether a line of shell, or an option, has a secret in it; one that it reads from a file or a variable is none."""
    plain = _OPTION.sub("", _EXPANSION.sub("", line))
    return redact_text(plain) != plain


def _is_secret_setting(where: str, name: str, value: str) -> bool:
    # The names of our own settings are no secrets' (model.moe.token_dispatcher).
    return is_secret(name, value) if ".options." in where else redact_text(value) != value


def _texts(value: Any, where: str, name: str = "") -> Iterator[tuple[str, str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, f"{where}.{key}" if where else str(key), str(key))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _texts(item, f"{where}[{number}]", name)
    elif isinstance(value, str):
        yield where, name, value


def _without_value(match: re.Match[str]) -> str:
    name, separator, quote, _ = match.groups()
    # Only names in capitals, as of the environment: in code, `key=lambda` and `token: int` are everyday.
    secret = name.isupper() and _NAMES.search(name) and not _HARMLESS.search(name)
    return f"{name}{separator}{quote}{REDACTED}" if secret else match[0]
