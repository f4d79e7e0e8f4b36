"""Writes docs/api.md from the docstrings of the kernel's public names: see `make build`.

    python -m esmfold2_trimul_tools.api_page > docs/api.md

Signatures are taken from the source as they stand, so that every Python gives the same page.
"""

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

from .repository import find_checkout, load_kernel

_TITLES = {"Args:": "Arguments", "Returns:": "Returns", "Raises:": "Raises"}
_HEAD = """# API

The public names of the package, however it was loaded; [use.md](use.md) has them at work.
`make build` writes this page from the docstrings.
"""


def page_of(kernel: ModuleType) -> str:
    """The page, in Markdown."""
    parts, results = [], {}
    for name in kernel.__all__:
        thing = getattr(kernel, name)
        parts.append(_section(name, thing))
        if isinstance(thing, FunctionType):
            returned = inspect.get_annotations(thing, eval_str=True)["return"]
            if getattr(returned, "__module__", "").startswith(kernel.__name__):
                results[returned.__name__] = returned
    parts += [_section(name, results[name]) for name in sorted(results)]
    things = {name: getattr(kernel, name) for name in kernel.__all__} | results
    index = [
        f"- [`{name}`](#{name.lower()}): {thing.__doc__.splitlines()[0]}"
        for name, thing in things.items()
    ]
    return "\n".join([_HEAD, *index, "", *parts]).rstrip("\n") + "\n"


def _section(name: str, thing: Any) -> str:
    lines = [f"## {name}", ""]
    if isinstance(thing, ModuleType):
        lines += [*_markdown(thing.__doc__), f"It has `{'`, `'.join(thing.__all__)}`.", ""]
    elif thing.__name__ != name:
        lines += [f"[`{thing.__name__}`](#{thing.__name__.lower()}) by another name.", ""]
    elif isinstance(thing, FunctionType):
        lines += [*_code(_signature(thing)), *_markdown(thing.__doc__)]
    else:
        lines += [*_code(f"class {name}", *_fields(thing)), *_markdown(thing.__doc__)]
        for member, value in vars(thing).items():
            function = value.fget if isinstance(value, property) else value
            if isinstance(function, FunctionType) and not member.startswith("_"):
                kind = ["@property"] if isinstance(value, property) else []
                lines += [f"### {name}.{member}", "", *_code(*kind, _signature(function))]
                lines += _markdown(function.__doc__)
    return "\n".join(lines)


def _code(*lines: str) -> list[str]:
    return ["```python", *lines, "```", ""]


def _parsed(thing: Any) -> tuple[list[str], Any]:
    """The lines of its source, and their tree."""
    source = textwrap.dedent(inspect.getsource(thing))
    return source.splitlines(), ast.parse(source).body[0]


def _signature(function: FunctionType) -> str:
    lines, tree = _parsed(function)
    return "\n".join(lines[tree.lineno - 1 : tree.body[0].lineno - 1]).removesuffix(":")


def _fields(kind: type) -> list[str]:
    """The lines of a class's public variables, with their comments."""
    lines, tree = _parsed(kind)
    return [
        line
        for node in tree.body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for line in lines[node.lineno - 1 : node.end_lineno]
        if not line.lstrip().startswith("_")
    ]


def _markdown(docstring: str) -> list[str]:
    """A docstring's paragraphs, its sections as lists, and its indented examples as code."""
    lines = []
    for block in _blocks(inspect.cleandoc(docstring)):
        title = _TITLES.get(block[0])
        if title is not None:
            lines += [f"**{title}**", "", *_items(textwrap.dedent("\n".join(block[1:]))), ""]
        elif block[0].startswith("    "):
            lines += _code(*textwrap.dedent("\n".join(block)).splitlines())
        else:
            lines += [*block, ""]
    return lines


def _blocks(text: str) -> Iterator[list[str]]:
    """Its paragraphs, each a list of lines; an example's paragraphs stay together."""
    block: list[str] = []
    for paragraph in re.split(r"\n\n", text):
        lines = paragraph.splitlines()
        if block and block[0].startswith("    ") and lines[0].startswith("    "):
            block += ["", *lines]
            continue
        if block:
            yield block
        block = lines
    yield block


def _items(text: str) -> list[str]:
    """The entries `name: what it is` of a section as a list; other text as it is."""
    lines = []
    for line in text.splitlines():
        entry = re.match(r"([\w*][\w*, .]*): (.*)", line)
        if entry:
            names = ", ".join(f"`{name}`" for name in entry[1].split(", "))
            lines.append(f"- {names}: {entry[2]}")
        else:
            lines.append(line if not line.startswith("    ") else f"  {line.strip()}")
    return lines


if __name__ == "__main__":
    sys.stdout.write(page_of(load_kernel(find_checkout())))
