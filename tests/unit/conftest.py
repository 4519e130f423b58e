from __future__ import annotations

import pytest

from steerserve.catalog import Catalog
from tests.unit.catalogs import make_catalog


@pytest.fixture(scope="session")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return make_catalog(tmp_path_factory.mktemp("catalog"))
