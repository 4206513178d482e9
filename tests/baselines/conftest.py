from collections.abc import Callable

import pytest


@pytest.fixture
def images(make_image: Callable[..., bytes]) -> list[bytes]:
    return [make_image(seed, *size) for seed, size in enumerate([(64, 64), (96, 48), (64, 64), (32, 80)])]
