import pytest

# Triton 3.6's interpreter turns arrays of one element into loop bounds; numpy 2.4 refuses that.
IGNORED = "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.filterwarnings(IGNORED))
