from collections.abc import Callable

import pytest
from clusters import Problem, clusters


@pytest.fixture
def problem() -> Problem:
    return clusters(3, 4, 5)


@pytest.fixture
def images(make_image: Callable[..., bytes]) -> list[bytes]:
    return [make_image(seed, *size) for seed, size in enumerate([(64, 64), (96, 48), (64, 64), (32, 80)])]
