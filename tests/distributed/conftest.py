"""The warm worker pool, shared by every distributed test of the session."""

from collections.abc import Iterator

import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Processes that have imported torch and megatron and registered the CPU device layer."""
    warm = Pool()
    yield warm
    warm.close()
