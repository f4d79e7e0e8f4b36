"""docs/api.md is what the docstrings say, and the docstrings are read as they are meant."""

import importlib

from esmfold2_trimul_tools.api_page import page_of
from fresh_process import ROOT
from helpers import PUBLIC_NAMES

SOURCE = '''
"""A kernel."""
__all__ = ["both", "other", "whole"]


class Result:
    """What came of it."""

    size: int  # in bytes
    _hidden: int

    @property
    def half(self) -> int:
        """Half of it."""

    def _inner(self):
        """Not shown."""


def both(
    x: int,  # [L]
    *more: str,
) -> Result:
    """The first line.

        both(1)

        both(2)

    Args:
        x, more: what it
            takes.

    Raises:
        ValueError: never.
    """


def whole() -> int:
    """Nothing else."""


other = whole
'''
PAGE = """
## both

```python
def both(
    x: int,  # [L]
    *more: str,
) -> Result
```

The first line.

```python
both(1)

both(2)
```

**Arguments**

- `x`, `more`: what it
  takes.

**Raises**

- `ValueError`: never.

## other

[`whole`](#whole) by another name.

## whole

```python
def whole() -> int
```

Nothing else.

## Result

```python
class Result
    size: int  # in bytes
```

What came of it.

### Result.half

```python
@property
def half(self) -> int
```

Half of it.
"""


def test_the_page_is_what_the_docstrings_give(kernel):
    page = page_of(kernel)
    assert (ROOT / "docs" / "api.md").read_text() == page, "docs/api.md is old: make build"
    headings = [line[3:] for line in page.splitlines() if line.startswith("## ")]
    assert headings == [*PUBLIC_NAMES, "Explanation", "PatchReport"]


def test_docstrings_become_markdown(tmp_path, monkeypatch):
    (tmp_path / "a_kernel.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    page = page_of(importlib.import_module("a_kernel"))
    assert "- [`both`](#both): The first line.\n" in page
    assert page.endswith(PAGE)
