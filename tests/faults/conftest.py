"""What the tests of faults share: a very small model, finished runs, and the counts on the last line."""
from types import SimpleNamespace

import pytest

from faults.helpers import back_to, copy, fine, run
from faults.small_model import write_small_model


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """The last line of `make faults`."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter and not hasattr(config, "workerinput"):
        stats = reporter.stats
        failed = len(stats.get("failed", [])) + len(stats.get("error", []))
        print(f"{len(stats.get('passed', []))} passed, {failed} failed", flush=True)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Two models in folders, `one` and `two`, with other weights and tokenizers."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two")):
        write_small_model(folder / name, seed)
    return SimpleNamespace(one=folder / "one", two=folder / "two")


@pytest.fixture(scope="session")
def text_run(models, tmp_path_factory):
    """The --runs folder of three steps of tiny-llm, finished. Copy it before you go on."""
    folder = tmp_path_factory.mktemp("text") / "runs"
    fine(run(models.one, folder))
    return folder


@pytest.fixture
def half(text_run, tmp_path):
    """A copy of `text_run` as if it had been killed after step 2."""
    folder = copy(text_run, tmp_path / "runs")
    back_to(folder / "tiny-llm", 2)
    return folder
