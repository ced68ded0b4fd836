"""Remove credentials from everything that rgsd writes to files and to the terminal.

There are two levels, because data must not be altered and messages may be:

- `redact_known` replaces only the values of known credentials. It is safe for data: a response that explains
  `Authorization: Bearer ...` stays as the model wrote it.
- `redact` also replaces anything that looks like a credential: `user:password@` in a URL, `?api-key=`, bearer tokens,
  and the key formats of well-known providers. It is for messages, logs and command lines.

Known credentials are the values of environment variables whose names have an ending of `_ENV_ENDINGS`, and the values
passed to `remember` and `remember_settings`.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

MASK = "***"
SHORTEST_IN_ENVIRONMENT = 8
SHORTEST = 6
"""Shorter values do not count as credentials. Otherwise `TOKEN=1` in the environment would mask every 1."""

_ENV_ENDINGS = (
    "API_KEY", "_TOKEN", "_SECRET", "_SECRET_KEY", "_ACCESS_KEY", "_PASSWORD", "_PASSWD", "_CREDENTIALS", "_PAT",
)  # fmt: skip
# Not every `*_token` is a credential: a tokenizer has a pad_token.
_SECRET_NAME = (
    r"(?:(?:[a-z0-9]{1,32}[-_]){0,4}(?:api[-_]?key|secret|password|passwd|(?:client|secret|access|private)[-_]?key)|"
    r"(?:(?:access|api|auth|bearer|use[-_]auth|hub|push[-_]to[-_]hub|hf|id|refresh|security|session)[-_]?)?token|"
    r"authorization)"
)
_IS_SECRET_NAME = re.compile(_SECRET_NAME, re.IGNORECASE)

# Each pattern starts with a literal or has a bound, so that matching takes linear time.
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"://[^\s/@\"'<>?#]{1,1024}@"), f"://{MASK}@"),
    (re.compile(rf"([?&](?:{_SECRET_NAME}|key|sig|signature)=)[^&\s\"'#<>]+", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(r"(\bauthorization[\"']?\s{0,4}[:=]\s{0,4}[\"']?(?:bearer|basic|token)\s+)[^\s\"',;]+", re.IGNORECASE),
     rf"\1{MASK}"),
    (re.compile(r"(\bbearer\s+)[A-Za-z0-9._~+/=-]{16,}", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(r"(?<![A-Za-z0-9])(?:sk|pk|rk)-[A-Za-z0-9_-]{16,}"), MASK),
    (re.compile(r"(?<![A-Za-z0-9])(?:hf_|gh[pousr]_|github_pat_|glpat-|xox[abpr]-|AKIA|AIza)[A-Za-z0-9_-]{16,}"), MASK),
    (re.compile(r"([\"'](?:api[-_]?key|apikey|(?:hub_|access_|auth_)?token|secret|password)[\"']\s{0,4}:\s{0,4}[\"'])"
                r"[^\"']+", re.IGNORECASE), rf"\1{MASK}"),
)  # fmt: skip

_remembered: set[str] = set()


def remember(secret: str | None) -> None:
    """Make a credential known, so that it is removed from everything that is stored or shown.

    Values with fewer than `SHORTEST` characters are ignored.
    """
    if secret and len(secret.strip()) >= SHORTEST:
        _remembered.update(_spellings(secret.strip()))


def remember_settings(settings: Any) -> None:
    """Make all credentials in settings known: values with secret names, and users, passwords and keys in URLs.

    Args:
        settings: A mapping, sequence or string, of any depth.
    """
    for name, value in _leaves(settings, ""):
        if is_secret_name(name):
            remember(value)
        elif "://" in value:
            for secret in _in_url(value):
                remember(secret)


def is_secret_name(name: str) -> bool:
    """Whether a setting with this name holds a credential."""
    return _IS_SECRET_NAME.fullmatch(name) is not None


def without_credentials(settings: Any) -> Any:
    """Settings that are safe to store.

    Settings with secret names are left out, URLs lose user, password and key, and known values are masked. Whoever uses
    the settings again must supply the credentials, by the environment or the command line.
    """
    if isinstance(settings, Mapping):
        return {k: without_credentials(v) for k, v in settings.items() if not (is_secret_name(str(k)) and v)}
    if isinstance(settings, list | tuple):
        return [without_credentials(v) for v in settings]
    if isinstance(settings, str):
        return redact_known(without_url_credentials(settings) if "://" in settings else settings)
    return settings


def without_url_credentials(url: str) -> str:
    """A URL without user, password and secret query parameters. Other text is returned unchanged."""
    try:
        parts = urlsplit(url)
        if not parts.scheme or not parts.netloc:
            return url
        asked = parse_qsl(parts.query, keep_blank_values=True)
    except ValueError:
        return url
    query = [(k, v) for k, v in asked if not _is_secret_parameter(k)]
    if "@" not in parts.netloc and query == asked:
        return url
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=urlencode(query)))


def redact_known(text: str) -> str:
    """Remove the values of known credentials. For rows, replies and all other data."""
    pattern = _known_pattern()
    return pattern.sub(MASK, text) if pattern is not None else text


def redact(text: str) -> str:
    """Remove known credentials and anything that looks like one. For messages, logs and command lines."""
    text = redact_known(text)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def redact_arguments(argv: Sequence[str]) -> list[str]:
    """A command line that is safe to store and show: `--hub_token VALUE` and `--hub_token=VALUE` lose their values."""
    shown, is_value = [], False
    for word in argv:
        name, equals, _ = word.partition("=")
        is_flag = word.startswith("--") and is_secret_name(name.lstrip("-"))
        if is_value and not word.startswith("--"):
            shown.append(MASK)
        elif is_flag and equals:
            shown.append(f"{name}={MASK}")
        else:
            shown.append(redact(word))
        is_value = is_flag and not equals
    return shown


class RedactingStream:
    """A text stream that removes known credentials from everything written to it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact_known(text))
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _leaves(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yield all strings in nested settings, each with the name of its setting."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner, name)
    elif isinstance(value, str) and value:
        yield name, value


def _is_secret_parameter(name: str) -> bool:
    return is_secret_name(name) or name.lower() in ("key", "sig", "signature")


def _in_url(url: str) -> list[str]:
    """The secrets in a URL: its password, its user if that is the key, and its secret query parameters."""
    try:
        parts = urlsplit(url)
        password, user = parts.password or "", parts.username or ""
        secrets = [password, *(v for k, v in parse_qsl(parts.query) if _is_secret_parameter(k))]
    except ValueError:
        return []
    if user or password:
        # The form in which HTTP's basic authentication sends the pair, and in which a server may echo it.
        secrets.append(base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode())
    # Some services take the key as the user, without a password.
    return [*secrets, user] if user and not password else secrets


def _spellings(secret: str) -> set[str]:
    """The forms of a secret in plain text, JSON, URLs, HTML and base64."""
    data = secret.encode("utf-8", "surrogatepass")
    encoded = {base64.b64encode(data).decode().rstrip("="), base64.urlsafe_b64encode(data).decode().rstrip("=")}
    lower = re.sub("%[0-9A-F]{2}", lambda found: found[0].lower(), quote(secret, safe="", errors="surrogatepass"))
    return encoded | {
        secret, json.dumps(secret)[1:-1], json.dumps(secret)[1:-1].replace("/", "\\/"),
        json.dumps(secret, ensure_ascii=False)[1:-1], quote(secret, safe="", errors="surrogatepass"), lower,
        unquote(secret), html.escape(secret), html.escape(secret).replace("&#x27;", "&#39;").replace("&quot;", "&#34;"),
    }  # fmt: skip


_cached: tuple[frozenset[str], re.Pattern[str] | None] = (frozenset(), None)


def _known_pattern() -> re.Pattern[str] | None:
    """A pattern for all known credentials, longest first. It is rebuilt when they change."""
    global _cached
    values = {
        value.strip()
        for name, value in os.environ.items()
        if name.upper().endswith(_ENV_ENDINGS) and len(value.strip()) >= SHORTEST_IN_ENVIRONMENT
    }
    known = frozenset(_remembered.union(*(_spellings(v) for v in values)))
    if known != _cached[0]:
        ordered = sorted(known, key=lambda s: (-len(s), s))
        _cached = known, re.compile("|".join(re.escape(s) for s in ordered)) if ordered else None
    return _cached[1]


__all__ = [
    "MASK", "RedactingStream", "is_secret_name", "redact", "redact_arguments", "redact_known", "remember",
    "remember_settings", "without_credentials", "without_url_credentials",
]  # fmt: skip
