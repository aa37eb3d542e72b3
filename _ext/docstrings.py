"""Sphinx extension: show nflib's docstrings, which are plain text, as they read in the source.

Authors write formulas as indented blocks, parameters as ``name: what it is`` and code in single
or double backticks. Sphinx expects reStructuredText, where ``log|det W|`` would be a substitution
and ``x_`` a link. This extension turns the one into the other. Signatures are shown as they are
written: ``dim: Size``, and not the rule for which Size stands.
"""

import inspect
import re

HEADER = re.compile(r"[A-Z]\w+:$")
# `name: text` or `lower, upper: text`, and no sentence before the colon.
ITEM = re.compile(r"([A-Za-z_][\w.]*(?:, [A-Za-z_][\w.]*)*): (.+)")
BULLET = re.compile(r"- (.+)")
CODE = re.compile(r"``(.+?)``|`([^`]+)`")
EMPHASIS = re.compile(r"(?<![\w*])\*(?=\S)([^*]+?)(?<=\S)\*(?![\w*])")


def escape(text: str) -> str:
    """Take the meaning from the characters which reStructuredText gives one."""
    return re.sub(r"([\\*|_`])", r"\\\1", text)


def inline(text: str) -> str:
    """Code in backticks stays code, ``*words*`` stay stressed, all else is plain text."""
    result, end = "", 0
    for match in CODE.finditer(text):
        result += plain(text[end : match.start()])
        code = (match[1] or match[2]).strip()
        # A literal must not touch the words around it: an escaped blank separates them unseen.
        before = "\\ " if result and (result[-1].isalnum()) else ""
        after = "\\ " if text[match.end() : match.end() + 1].isalnum() else ""
        result += f"{before}``{code}``{after}"
        end = match.end()
    return result + plain(text[end:])


def plain(text: str) -> str:
    result, end = "", 0
    for match in EMPHASIS.finditer(text):
        result += escape(text[end : match.start()]) + f"*{escape(match[1])}*"
        end = match.end()
    return result + escape(text[end:])


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def items(lines: list[str]) -> list[str] | None:
    """A list of ``name: text`` with hanging indents as bullets; None if the lines are no list."""
    found: list[tuple[str, str]] = []
    base = indent(lines[0])
    for line in lines:
        if indent(line) == base:
            if match := ITEM.match(line.strip()):
                names = ", ".join(f"``{name}``" for name in match[1].split(", "))
                found.append((names, match[2]))
            elif match := BULLET.match(line.strip()):
                found.append(("", match[1]))
            else:
                return None
        elif found:
            found[-1] = (found[-1][0], found[-1][1] + " " + line.strip())
    if not found:
        return None
    return [f"- {name + ': ' if name else ''}{inline(text)}" for name, text in found]


def blocks(lines: list[str]) -> list[list[str]]:
    """The groups of lines between blank lines."""
    groups: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            groups[-1].append(line.rstrip())
        elif groups[-1]:
            groups.append([])
    return [group for group in groups if group]


def render(group: list[str]) -> list[str]:
    """One block of text in reStructuredText."""
    if all(indent(line) >= 4 for line in group):
        return ["::", "", *group]
    # A header among the lines starts its own block; so does a change from text to formula.
    for position in range(1, len(group)):
        line, previous = group[position], group[position - 1]
        if HEADER.fullmatch(line) or re.match(r"(?:Returns|Raises): ", line):
            return [*render(group[:position]), "", *render(group[position:])]
        if indent(line) >= 4 and indent(previous) == 0 and not HEADER.fullmatch(previous):
            if not ITEM.match(previous) and not BULLET.match(previous):
                formula = next(
                    (i for i in range(position, len(group)) if indent(group[i]) == 0), len(group)
                )
                rest = render(group[formula:]) if formula < len(group) else []
                literal = ["::", "", *group[position:formula]]
                return [*render(group[:position]), "", *literal, "", *rest]
    if HEADER.fullmatch(group[0]):
        listed = items(group[1:]) if len(group) > 1 else []
        body = listed if listed is not None else [inline(line.strip()) for line in group[1:]]
        return [f"**{group[0][:-1]}**", "", *body]
    if len(group) > 1 and (listed := items(group)):
        return listed
    return [inline(line.strip()) for line in group]


def to_rst(lines: list[str]) -> list[str]:
    """A docstring's lines as reStructuredText."""
    result: list[str] = []
    for group in blocks(lines):
        result += [*render(group), ""]
    return result


def process(app, what, name, obj, options, lines) -> None:
    if name.split(".")[0] == "nflib":
        lines[:] = to_rst(lines)
    else:
        # What is inherited from torch is documented there.
        lines[:] = lines[:1]


def as_written(app, what, name, obj, options, signature, returned):
    """The signature with its annotations as they stand in the source."""
    if not signature or name.split(".")[0] != "nflib":
        return None
    try:
        found = inspect.signature(obj.__init__ if isinstance(obj, type) else obj)
    except (TypeError, ValueError):
        return None
    parameters = [p for key, p in found.parameters.items() if key not in ("self", "cls")]
    empty = inspect.Signature.empty
    text = str(found.replace(parameters=parameters, return_annotation=empty))
    result = None if isinstance(obj, type) or found.return_annotation is empty else returned
    if result is not None and isinstance(found.return_annotation, str):
        result = found.return_annotation
    return re.sub(r": '([^']*)'", r": \1", text), result


def setup(app):
    app.connect("autodoc-process-docstring", process)
    app.connect("autodoc-process-signature", as_written)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
