import pytest
from clusters import Problem, clusters


@pytest.fixture
def problem() -> Problem:
    return clusters(3, 4, 5)
