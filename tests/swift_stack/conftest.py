"""Without ms-swift the tests are skipped; one small model and its data serve all of them."""

import importlib.metadata
import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    try:
        importlib.metadata.version("ms-swift")
    except importlib.metadata.PackageNotFoundError:
        skip = pytest.mark.skip(reason="needs ms-swift: make test-swift")
        for item in items:
            if "swift_stack" in item.path.parts:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    from swift_stack.small import build_model, prepare_swift

    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = build_model(tmp_path_factory.mktemp("model"))
    prepare_swift(folder)
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    from swift_stack.small import build_rows

    return build_rows(tmp_path_factory.mktemp("rows"), ["image", "two", "image", "image"] * 2)


@pytest.fixture
def run(model, rows, tmp_path):
    """A run of swift's: run("num_views=2", loss_type="dapo"); options None: swift's own trainer."""
    from swift_stack.small import flags, train

    def started(options, *, dataset=rows, configured=None, **changed):
        words = flags(model, dataset, tmp_path / "out", **changed)
        return train(words, options, **(configured or {}))

    return started
