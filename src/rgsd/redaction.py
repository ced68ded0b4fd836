"""Credentials never reach a file or a terminal: one place that knows them and takes them out of text.

Two strengths, because a row is data and an error message is not:

- `redact_known` replaces the *values* of known credentials and nothing else. It is safe on rows: a response that
  explains `Authorization: Bearer ...` stays as the model wrote it.
- `redact` also replaces whatever *looks* like a credential: `user:password@` in a URL, `?api-key=`, bearer tokens, the
  key formats of well-known providers. It is for messages, logs and command lines.

Known credentials are the environment variables whose names end as in `_ENV_ENDINGS`, and every value that `remember` or
`remember_settings` was given.
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
"""Shorter values are not taken for credentials: with `TOKEN=1` in the environment every 1 would be masked."""

_ENV_ENDINGS = (
    "API_KEY", "_TOKEN", "_SECRET", "_SECRET_KEY", "_ACCESS_KEY", "_PASSWORD", "_PASSWD", "_CREDENTIALS", "_PAT",
)  # fmt: skip
# Not every `*_token`: a tokenizer's pad_token is no credential.
_SECRET_NAME = (
    r"(?:(?:[a-z0-9]{1,32}[-_]){0,4}(?:api[-_]?key|secret|password|passwd|(?:client|secret|access|private)[-_]?key)|"
    r"(?:(?:access|api|auth|bearer|use[-_]auth|hub|push[-_]to[-_]hub|hf|id|refresh|security|session)[-_]?)?token|"
    r"authorization)"
)
_IS_SECRET_NAME = re.compile(_SECRET_NAME, re.IGNORECASE)

# Each pattern starts with a literal or has a bound, so that a long text takes linear time.
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
    """Make a credential known: from here on it is taken out of everything stored or shown. Values below `SHORTEST`
    characters are ignored."""
    if secret and len(secret.strip()) >= SHORTEST:
        _remembered.update(_spellings(secret.strip()))


def remember_settings(settings: Any) -> None:
    """Make every credential in settings known: values under secret names, and users, passwords and keys in URLs.

    Args:
        settings: a mapping, sequence or string, nested as it comes.
    """
    for name, value in _leaves(settings, ""):
        if is_secret_name(name):
            remember(value)
        elif "://" in value:
            for secret in _in_url(value):
                remember(secret)


def is_secret_name(name: str) -> bool:
    """Whether a setting of this name holds a credential."""
    return _IS_SECRET_NAME.fullmatch(name) is not None


def without_credentials(settings: Any) -> Any:
    """Settings as they may be stored: secret names left out, URLs without user, password and key, known values masked.

    What is left out has to be given again, by the environment or the command line, when the settings are used again.
    """
    if isinstance(settings, Mapping):
        return {k: without_credentials(v) for k, v in settings.items() if not (is_secret_name(str(k)) and v)}
    if isinstance(settings, list | tuple):
        return [without_credentials(v) for v in settings]
    if isinstance(settings, str):
        return redact_known(without_url_credentials(settings) if "://" in settings else settings)
    return settings


def without_url_credentials(url: str) -> str:
    """A URL without user, password and secret query parameters; text that is no URL comes back as it is."""
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
    """The text without the values of known credentials. For rows, replies and every other kind of data."""
    pattern = _known_pattern()
    return pattern.sub(MASK, text) if pattern is not None else text


def redact(text: str) -> str:
    """The text without known credentials and without what looks like one. For messages, logs and command lines."""
    text = redact_known(text)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def redact_arguments(argv: Sequence[str]) -> list[str]:
    """A command line as it may be stored and shown: `--hub_token VALUE` and `--hub_token=VALUE` lose their values."""
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
    """A text stream that takes known credentials out of whatever is written to it; all else is the stream's own."""

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
    """Strings with the name that each stands under."""
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
    """The secrets in a URL: its password, its user (some services put the key there), secret query parameters."""
    try:
        parts = urlsplit(url)
        found = [parts.password or "", *(v for k, v in parse_qsl(parts.query) if _is_secret_parameter(k))]
        user = parts.username or ""
    except ValueError:
        return []
    if user or found[0]:
        # A server that echoes headers echoes the pair as HTTP's basic authentication writes it.
        pair = f"{unquote(user)}:{unquote(found[0])}"
        found.append(base64.b64encode(pair.encode()).decode())
    return [*found, user] if user and not found[0] else found


def _spellings(secret: str) -> set[str]:
    """A secret as it is, and as JSON, a URL, HTML and base64 write it."""
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
    """One pattern of all known credentials, longest first, made anew when they change."""
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
