"""Pages that are files of the repository: they keep their places, so their links hold."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"\]\((?!docs/)([\w./-]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and every file of the repository that they or others link to."""
    root = Path(config.config_file_path).parent
    pages = [root / name for name in PAGES]
    names = set(PAGES)
    for page in (*pages, *Path(config.docs_dir).glob("*.md")):
        names.update(LINK.findall(page.read_text()))
    for name in sorted(names):
        if (root / name).is_file() and files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(root / name)))
    return files


def on_page_markdown(markdown: str, page: object, **others: object) -> str:
    """Their links into docs/ are links to its pages."""
    return markdown.replace("](docs/", "](")
