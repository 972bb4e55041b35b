"""What the site does to pages that are also read in the repository.

Links to files outside of this folder become their names, since the site does not hold those files.
Pages of the navigation that do not exist are left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"(!?)\[([^\]]*)\]\((\.\./[^)\s]+)\)")


def on_config(config: Any) -> Any:
    config.nav = _existing(config.nav, Path(config.docs_dir))
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    return _LINK.sub(_named, markdown)


def _named(match: re.Match[str]) -> str:
    image, text, target = match.groups()
    path = re.sub(r"^(\.\./)+", "", target)
    name = text.strip("`")
    if image:
        return f"*{text}* (`{path}`)"
    return f"`{path}`" if name in path else f"{text} (`{path}`)"


def _existing(entries: Any, folder: Path) -> list[Any]:
    kept: list[Any] = []
    for entry in entries:
        title, inner = (None, entry) if isinstance(entry, str) else next(iter(entry.items()))
        if isinstance(inner, list):
            kept.append({title: _existing(inner, folder)})
        elif (folder / inner).exists():
            kept.append(entry)
    return kept
