import pytest

pytest.register_assert_rewrite("tests.ops.tester")


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
