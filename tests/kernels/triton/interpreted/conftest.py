from collections.abc import Iterator

import pytest

from pisa_compile.kernels.triton import launcher

# Triton 3.6's interpreter turns arrays of one element into loop bounds; numpy 2.4 refuses that.
IGNORED = "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.filterwarnings(IGNORED))


@pytest.fixture(autouse=True)
def no_fallback() -> Iterator[None]:
    """A kernel that raises must not hide behind the configuration that replaces it."""
    launcher.forget_failures()
    yield
    assert not launcher.failures()
    launcher.forget_failures()
