"""Docstrings' examples as code: Griffe knows their section by the name "Examples" alone."""

import re

import griffe


class Examples(griffe.Extension):
    """Gives the section of every docstring that name."""

    def on_object(self, *, obj: griffe.Object, **others: object) -> None:
        """Called with each object of the package when it is complete."""
        if obj.docstring is not None:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
