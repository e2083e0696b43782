"""The PEP 517 backend: setuptools', with torch as a build requirement only if none is installed."""

from __future__ import annotations

import os

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - the hooks that are not changed here
from toolchain import TORCH_FLOOR, NotFound, find_torch, require_setuptools

require_setuptools()


def _torch_if_missing() -> list[str]:
    # pip's isolated build finds the torch of its environment, and must not download another one.
    # uv's does not find it, and an environment may have none: there a build needs a download.
    if os.environ.get("DEFORM_ATTN_SKIP_EXT") == "1":
        return []
    try:
        find_torch()
    except NotFound:
        return ["torch>=" + ".".join(map(str, TORCH_FLOOR))]
    return []


def get_requires_for_build_wheel(config_settings=None):  # noqa: D103
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_if_missing()


def get_requires_for_build_editable(config_settings=None):  # noqa: D103
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_if_missing()
