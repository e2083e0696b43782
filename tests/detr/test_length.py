"""The detectors stay small enough to be read in an evening, and stand on the public names alone."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import deform_attn
from deform_attn import detr

FILES = sorted(Path(detr.__file__).parent.glob("*.py"))
SYSTEMS = ["boxes", "decoder", "denoising", "dfine", "encoder", "losses", "matching", "models"]
NO_CODE = (
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    tokenize.ENDMARKER,
)


def lines_of_code(text: str) -> int:
    """Lines that hold a token and are no docstring."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node):
            docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def test_what_is_counted() -> None:
    code = ["x = 1  # one", "", "def f(y):", "    g(", "        x", "    )"]
    docs = ['"""Module."""', *code[:3], '    """F.', "", "    G.", '    """', *code[3:]]
    assert lines_of_code("\n".join(docs)) == 5


def test_all_systems_in_fewer_than_2200_lines_with_their_docstrings() -> None:
    lengths = {f.stem: len(f.read_text().splitlines()) for f in FILES if f.stem in SYSTEMS}
    assert len(lengths) == len(SYSTEMS)
    assert sum(lengths.values()) < 2200, lengths


def test_all_code_in_fewer_than_2200_lines() -> None:
    lengths = {file.stem: lines_of_code(file.read_text()) for file in FILES}
    assert sum(lengths.values()) < 2200, lengths


def test_of_the_package_only_public_names_are_imported() -> None:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert not any(a.name.startswith("deform_attn") for a in node.names), file.name
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deform_attn"):
                assert node.level == 0
                if node.module == "deform_attn":
                    names = {a.name for a in node.names} - {"detr"}
                    assert names <= set(deform_attn.__all__), file.name
                else:
                    assert str(node.module).startswith("deform_attn.detr"), file.name
