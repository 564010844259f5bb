"""Each benchmark owns one section of ``RESULTS.md``."""

from __future__ import annotations

import re
from pathlib import Path


def write_section(path: Path, section: str) -> None:
    """Put a section that starts with ``## `` in the place of the one of that name, or at the end."""
    text = path.read_text() if path.exists() else "# Results\n"
    heading = section.splitlines()[0]
    pattern = re.compile(rf"^{re.escape(heading)}$.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    new = f"{section.rstrip()}\n\n"
    text = pattern.sub(lambda _: new, text) if pattern.search(text) else f"{text.rstrip()}\n\n{new}"
    path.write_text(f"{text.rstrip()}\n")
