import importlib.util
import sys

import pytest

pytest.register_assert_rewrite("tests.ops.tester")

# A machine with a GPU has torch and pytest, and perhaps not the rest: what that leaves out is said at the end.
LEFT_OUT = []

if importlib.util.find_spec("hypothesis") is None:
    from tests import without_hypothesis

    sys.modules["hypothesis"] = without_hypothesis
    LEFT_OUT.append(f"property tests are skipped: {without_hypothesis.REASON}")

# The extra `train`.
TRAINING = ("cv2", "lightning", "matplotlib", "omegaconf", "PIL", "torchmetrics", "tqdm")
collect_ignore = []
if lacking := [name for name in TRAINING if importlib.util.find_spec(name) is None]:
    collect_ignore = ["cc4s", "test_docs.py", "test_release.py"]
    LEFT_OUT.append(f"tests/cc4s, tests/test_docs.py, tests/test_release.py: {', '.join(lacking)} not installed")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in LEFT_OUT:
        terminalreporter.write_line(f"LEFT OUT {line}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests of the op battery that have no meaning for an op (instead of a skip each)."""
    from tests.ops.tester import OpTester

    dropped = [
        item
        for item in items
        if isinstance(item, pytest.Function)
        and item.cls is not None
        and issubclass(item.cls, OpTester)
        and not item.cls.applies(item.originalname)
    ]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]
