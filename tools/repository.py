"""Write the repository's address everywhere: `python tools/repository.py https://github.com/you/it`.

`repository.url` in _config.yml is the one place that holds the address; every other file repeats it
because readers meet it there (the setup cell, README, the package's metadata). This tool replaces
the old address by the new one in every text file of the repository.
"""

import os
import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = {".md", ".ipynb", ".toml", ".yml", ".yaml", ".cff", ".py", ".html", ".txt"}
BUILT = {".git", ".venv", "_build", "build", "node_modules", "nflib.egg-info"}


def address(root: Path = ROOT) -> str:
    """The repository's address, as _config.yml has it."""
    config = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))
    return config["repository"]["url"].rstrip("/")


def files(root: Path = ROOT) -> list[Path]:
    """The text files which may hold the address."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - BUILT)
        found += [Path(folder, name) for name in sorted(names) if Path(name).suffix in SUFFIXES]
    return found


def keep_fresh(text: str, other: str) -> str:
    """Let a notebook's hash follow: the address is in code, yet no output depends on it."""
    import nbformat
    from notebooks import code_hash, recorded_hash

    notebook = nbformat.reads(text, as_version=4)
    if recorded_hash(notebook) != code_hash(notebook):
        return other
    return other.replace(code_hash(notebook), code_hash(nbformat.reads(other, as_version=4)))


def rewrite(new: str, root: Path = ROOT) -> list[Path]:
    """Replace the old address by `new`; return the files that changed."""
    new = new.rstrip("/").removesuffix(".git")
    if not re.fullmatch(r"https://[\w.-]+/[\w.-]+/[\w.-]+", new):
        raise ValueError(
            f"URL must look like https://github.com/you/normalizing-flows, and it is {new!r}."
        )
    old = address(root)
    changed = []
    # A longer address that only starts alike (a second repository) is left alone.
    pattern = re.compile(re.escape(old) + r"(?![\w-])")
    for path in files(root):
        text = path.read_text(encoding="utf-8")
        other = pattern.sub(new, text)
        if path.suffix == ".ipynb":
            other = keep_fresh(text, other)
        if other != text:
            path.write_text(other, encoding="utf-8")
            changed.append(path)
    return changed


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(f"The address is {address()}; 'make repository URL=https://...' changes it.")
        return 1
    try:
        changed = rewrite(arguments[0])
    except ValueError as problem:
        print(problem)
        return 1
    for path in changed:
        print(path.relative_to(ROOT))
    print(f"{len(changed)} files now say {address()}.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
