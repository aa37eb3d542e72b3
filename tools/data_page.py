"""Write datasets.md, the data page of the site, from the cards of nflib.data.

Run: `python tools/data_page.py`.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from urllib.parse import urlsplit

from nflib import data
from nflib.data.cards import CARDS, Card

PAGE = Path(__file__).resolve().parents[1] / "datasets.md"

ALT = (
    "Twenty panels: the ten 2-D toys as clouds of points, two columns of each of the six "
    "tables, rows of 8 by 8 digits, grey and colour patches of photographs, and pairs of "
    "neighbouring pixels, which lie close to the diagonal."
)

INTRO = f"""\
# Data sets

Every data set of the course has a name, and one line loads it:

```python
from nflib import data

train = data.load("digits")  # also split="valid" and split="test"
train.x, train.y, train.levels  # tensor, labels or None, number of grey levels or None
print(data.card("digits"))  # this page's entry as text
data.names()  # all names
```

```{{figure}} _static/datasets.png
:alt: {ALT}

The embedded data sets. They need no network and no files.
```

The **embedded** sets are generated or ship inside nflib, scikit-learn and scikit-image. They load
without a network. Sets that are drawn take `n` and `seed`; a name, a split and a seed always give
the same examples. For each 2-D toy `data.log_density(name)` returns the exact log density in nats,
and `data.potential("u1")` to `data.potential("u4")` return the energies.

The sets **loaded by name** are searched in this order:

1. the folder that the environment variable `NFLIB_DATA` names (it may be read-only),
2. `data/` of the clone,
3. the user's cache (on Linux `~/.cache/nflib`),
4. the mirrors, in the order given below.

A file is used only when its sha256 is right. A damaged or partial download is removed and the next
mirror tried; several processes may load at once. Without a network the error says which file is
missing and where to put it.
"""


def page() -> str:
    """The whole page as MyST Markdown."""
    parts = [INTRO]
    for group, cards in groupby(CARDS.values(), key=lambda c: c.group):
        parts.append(f"## {group}\n")
        parts += [section(card) for card in cards]
    return "\n".join(parts)


def section(card: Card) -> str:
    """One card: its name, what it is, a table of facts, and its files if it has any."""
    what = card.what[0].upper() + card.what[1:]
    lines = [f"### {card.name}\n", f"{what}.\n", "| | |", "|---|---|"]
    for label, text in card.rows():
        lines.append(f"| {label} | {f'<{text}>' if label == 'source' else cell(text)} |")
    lines += [f"| load | `{card.load}` |", ""]
    if card.files:
        lines += files(card)
    return "\n".join(lines)


def files(card: Card) -> list[str]:
    """The table of files with their checksums, and the mirrors."""
    lines = ["| file | bytes | sha256 |", "|---|---|---|"]
    for file in card.files:
        # An archive that may be packed anew has neither a fixed size nor a fixed sha256.
        size = f"{file.size:,}" if file.sha256 else f"about {file.size:,}"
        lines.append(f"| `{file.path}` | {size} | {sha256(file.sha256)} |")
    hosts = dict.fromkeys(urlsplit(url).hostname for file in card.files for url in file.urls)
    where = ", ".join(f"`{host}`" for host in hosts) or "none, only a data folder"
    also = dict.fromkeys(file.instead for file in card.files if file.instead)
    lines += ["", f"Mirrors: {where}."]
    if also:
        lines[-1] += f" A data folder may hold `{', '.join(also)}` instead."
    return [*lines, ""]


def sha256(value: str | None) -> str:
    return f"`{value}`" if value else "of the recordings, see `nflib.data.archives`"


def cell(text: str) -> str:
    """Text for a cell: Markdown sees the asterisk of a formula as emphasis."""
    return text if "`" in text else text.replace("*", r"\*")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE.name}: {len(data.names())} data sets")
