"""Options and fixtures: each test body runs for every runner, dtype and case that it requests.

Fixtures `runner`, `dtypes`, `case` (from runners.py and `deform_attn.testing`) are combined at
collection; a combination that cannot run is not collected, and the header lists the runners that do
not run, with the reasons. Tests with the fixture `torchvision` are collected where there is one.
`golden_case` goes through the recorded modules (--goldens).
The marker `only` restricts the choice, and further for slow runners (interpreted kernels):

    @pytest.mark.only(runners=package, dtypes=["f64", "f32"], slow={"dtypes": ["f32"]})
    @pytest.mark.only(cases=lambda case: case.batch > 0, slow=None)  # none of them
"""

from __future__ import annotations

import getpass
import importlib.util
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # the workers share the cores, and so do the processes that tests start
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))

from deform_attn.testing import CASES, DTYPES, MIXED_DTYPES
from tests import vision
from tests.runners import Runner, all_runners, unavailable

ALL_DTYPES = DTYPES | MIXED_DTYPES

if importlib.util.find_spec("hypothesis"):  # tests of the operator run without it
    from hypothesis import HealthCheck, settings

    quiet = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    settings.register_profile("repeatable", derandomize=True, **quiet)
    settings.register_profile("explore", derandomize=False, print_blob=True, **quiet)
    settings.load_profile("repeatable")


def separate_compiled_code(environment: MutableMapping[str, str]) -> None:
    """Give torch.compile a cache for each forced instruction set.

    The keys of its cache do not contain the forced one.
    """
    if forced := environment.get("ATEN_CPU_CAPABILITY"):
        folder = os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}_{forced}")
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)


separate_compiled_code(os.environ)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("deform_attn")
    group.addoption(
        "--goldens",
        type=Path,
        default=Path(__file__).parent / "goldens",
        help="folder with the recorded reference outputs",
    )
    group.addoption(
        "--runners", default="", help="comma-separated names (see the header); default: all"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "only(runners, dtypes, cases, slow): restricts the combinations"
    )
    named = [name for name in config.getoption("--runners").split(",") if name]
    known = {runner.name: runner for runner in all_runners()}
    if unknown := set(named) - set(known):
        raise pytest.UsageError(f"--runners: no {sorted(unknown)}; known: {sorted(known)}")
    if named:
        chosen = [known[name] for name in named]
    else:
        chosen = [runner for runner in known.values() if runner.default]
    reasons = unavailable()
    if impossible := [runner.name for runner in chosen if named and runner.name in reasons]:
        raise pytest.UsageError(f"--runners: {impossible[0]} cannot run: {reasons[impossible[0]]}")
    config.stash[CHOSEN] = [runner for runner in chosen if runner.name not in reasons]


CHOSEN = pytest.StashKey[list[Runner]]()


def pytest_report_header(config: pytest.Config) -> list[str]:
    chosen = config.stash[CHOSEN]
    lines = ["runners:"]
    for runner in chosen:
        dtypes = [name for name, dtypes in DTYPES.items() if runner.why_not(dtypes) is None]
        lines.append(f"  {runner.name}: {', '.join(dtypes)}")
    reasons = unavailable()
    for runner in all_runners():
        if runner not in chosen:
            reasons.setdefault(runner.name, f"on request: --runners {runner.name}")
    names = {runner.name for runner in chosen}
    lines += [f"  not {name}: {why}" for name, why in reasons.items() if name not in names]
    if why := vision.why_not():
        lines.append(f"not collected: tests that need torchvision: {why}")
    return lines


def _picked(choice: Any, everything: dict[str, Any]) -> list[Any]:
    if choice is None:
        return list(everything.values())
    if callable(choice):
        return [thing for thing in everything.values() if choice(thing)]
    return [everything[name] for name in choice]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_case" in metafunc.fixturenames:
        facts = json.loads(
            (metafunc.config.getoption("--goldens") / "msda_modules.json").read_text()
        )
        metafunc.parametrize("golden_case", list(facts["config"]["cases"]))
    names = [n for n in ("runner", "dtypes", "case") if n in metafunc.fixturenames]
    if not names:
        return
    marker = metafunc.definition.get_closest_marker("only")
    only = dict(marker.kwargs) if marker else {}
    for_slow = only.pop("slow", {})
    rows, ids = [], []
    for runner in metafunc.config.stash[CHOSEN] if "runner" in names else [None]:
        choice = only
        if runner is not None:
            if runner.slow and for_slow is None:
                continue
            choice = only | for_slow if runner.slow else only
            if not choice.get("runners", lambda _: True)(runner):
                continue
        dtypes = _picked(choice.get("dtypes", list(DTYPES)), ALL_DTYPES)
        cases = _picked(choice.get("cases"), CASES)
        for dtype, case in itertools.product(
            dtypes if "dtypes" in names else [None], cases if "case" in names else [None]
        ):
            if runner is not None and not runner.takes(case, dtype):
                continue
            fitted = runner.fitted(case) if runner is not None and case is not None else case
            row = {"runner": runner, "dtypes": dtype, "case": fitted}
            rows.append([row[name] for name in names])
            ids.append("-".join(row[name].name for name in names))
    if not rows:  # nothing that runs here: collected as one deselected item, not as a skip
        rows, ids = [[None] * len(names)], [NOTHING]
    metafunc.parametrize(names, rows, ids=ids)


NOTHING = "nothing-to-run"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    empty = [item for item in items if NOTHING in item.name]
    if vision.why_not():
        empty += [item for item in items if "torchvision" in getattr(item, "fixturenames", ())]
    if empty:
        config.hook.pytest_deselected(items=empty)
        items[:] = [item for item in items if item not in empty]


@pytest.fixture
def goldens(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.config.getoption("--goldens")
    assert folder.is_dir(), f"--goldens: no folder {folder}"
    return folder


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory is full of NaN, so that an unwritten element is found; deterministic mode."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads; the number before the test is set again after it."""
    threads = torch.get_num_threads()
    try:
        yield torch.set_num_threads
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def torchvision() -> Iterator[None]:
    """A test that needs torchvision requests it, and is collected where there is one."""
    with vision.enabled():
        yield


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(0)
