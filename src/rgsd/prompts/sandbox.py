"""A sandbox for templates that limits time and memory as well as access.

A template may come with a run's folder. jinja's sandbox keeps it from Python's internals; here it also gets a limited
number of steps and no text above `MAX_CHARS`. Steps are counted instead of seconds, so a slow machine changes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_STEPS = 300_000
"""Most turns of loops and calls of macros in one rendering."""
MAX_CHARS = 10_000_000
"""Longest text, and longest list, that a template may make."""
MAX_BITS = 4096
"""Longest whole number that a template may compute."""

_STEP, _JOINED = "_rgsd_step", "_rgsd_joined"


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja's immutable sandbox with limits. One rendering at a time."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            undefined=jinja2.StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True, finalize=_checked
        )
        self._n_steps = 0
        self.filters = {name: _guarded(f) for name, f in self.filters.items()} | {"format": _no_format}
        del self.globals["lipsum"]  # a loop without steps
        self.globals |= {_STEP: self._step, _JOINED: _joined}

    def limited(self, tree: nodes.Template) -> nodes.Template:
        """The parsed template with a count of its steps."""
        return _Counting(self).visit(tree)

    def render(self, template: jinja2.Template, **variables: Any) -> str:
        """Render a template of this environment.

        Raises:
            SecurityError: If it exceeds a limit.
        """
        self._n_steps = 0
        return template.render(**variables)

    @staticmethod
    def concat(parts: Iterable[str]) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What jinja joins the output with: of a template, a macro or a block."""
        return _joined(*parts) if isinstance(parts, list) else _joined_lazily(parts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator, unless its result would be too large."""
        if operator == "%" and isinstance(left, str | bytes):
            _no_format()
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_BITS:
                raise SecurityError(f"a template cannot compute numbers of more than {MAX_BITS} bits")
        elif operator == "*":
            _limit(_extent(left) * _extent(right))
        elif operator == "+":
            _limit(_extent(left) + _extent(right))
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may read an attribute: not those that format text to any length."""
        if isinstance(obj, str) and attr in ("format", "format_map"):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore
        """A call, unless it is a method of a text whose result would be too large."""
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str | bytes):
            _check_call(owner, *args, **kwargs)
        return super().call(context, function, *args, **kwargs)

    def _step(self) -> str:
        self._n_steps += 1
        if self._n_steps > MAX_STEPS:
            raise SecurityError(f"a template may take {MAX_STEPS:,} turns of loops and calls of macros")
        return ""


class _Counting(NodeTransformer):
    """Puts a step into every loop and macro, and `~` under the limit of length."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self._environment = environment

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._with_step(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._with_step(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._with_step(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call(_JOINED, node.nodes, node.lineno)

    def _with_step(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.Output([self._call(_STEP, [], node.lineno)], lineno=node.lineno))
        return node

    def _call(self, name: str, args: list[nodes.Expr], line: int) -> nodes.Call:
        call = nodes.Call(nodes.Name(name, "load", lineno=line), args, [], None, None, lineno=line)
        call.set_environment(self._environment)
        return call


def _no_format(*_: Any) -> str:
    raise SecurityError("a template cannot format text, which can be of any length: use ~ and round")


def _limit(n: int) -> None:
    if n > MAX_CHARS:
        raise SecurityError(f"a template may make texts and lists of {MAX_CHARS:,} characters or items")


def _extent(value: Any) -> int:
    """The length of a text or list, a number as it would repeat one; 1 for anything else."""
    if isinstance(value, str | bytes | list | tuple):
        return max(1, len(value))
    return max(1, value) if isinstance(value, int) else 1


def _checked(value: Any) -> Any:
    """The value, unless its text is too long: a list that holds itself many times over prints without end."""
    if isinstance(value, list | tuple | Mapping):
        _size(value)
    return value


def _size(value: Any) -> int:
    """The characters and items of a value, nested ones included, each as often as it would be printed."""
    total, left = 0, [value]
    while left:
        one = left.pop()
        total += len(one) if isinstance(one, str | bytes) else 1
        _limit(total)
        if isinstance(one, Mapping):
            left += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple):
            _limit(total + len(left) + len(one))
            left += one
    return total


def _joined(*parts: Any) -> str:
    _limit(sum(_size(part) for part in parts))
    return "".join(map(str, parts))


def _joined_lazily(parts: Iterable[str]) -> str:
    found, n = [], 0
    for part in parts:
        n += len(part)
        _limit(n)
        found.append(part)
    return "".join(found)


def _check_call(first: Any, *args: Any, **kwargs: Any) -> None:
    """Refuse a call whose result could be too large: each argument may be repeated for each character."""
    others = [*args, *kwargs.values()]
    _limit(_size(first) * max((_extent(a) for a in others), default=1) + sum(_size(a) for a in others))


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    # jinja marks the filters that it passes its context, before the value.
    n_own = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        given = [list(a) if hasattr(a, "__next__") else a for a in args[n_own:]]  # what `map` and `select` leave
        _check_call(*given, **kwargs)
        return function(*args[:n_own], *given, **kwargs)

    return guarded
