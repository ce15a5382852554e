"""pytest set-up for the tests and, through nbval, for the stored notebooks."""

import pytest

import omniforcing_lib  # noqa: F401  says how waiting threads wait, before any test imports torch

# What a reader may see change from run to run: warnings on stderr, tables in HTML, players, bars on a slow machine.
NOT_COMPARED = ("stderr", "text/html", "text/markdown")


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):
        collector.skip_compare = (*collector.skip_compare, *NOT_COMPARED)


def pytest_runtest_setup(item):
    if compare := getattr(item, "compare_outputs", None):
        from series.runner import WIDGET

        def without_widgets(*sides):
            return compare(*([o for o in outputs if WIDGET not in o.get("data", {})] for outputs in sides))

        item.compare_outputs = without_widgets


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep a file with one worker, for its fixtures and its kernel; the notebooks of the series are shared out."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return nodeid if "test_series.py" in nodeid else super()._split_scope(nodeid)

    return Scheduling(config, log)


def pytest_ignore_collect(collection_path, config):
    """Leave out, under `-m gpu`, files without such a test: a machine with a GPU may lack what they import."""
    if config.getoption("markexpr") == "gpu" and collection_path.suffix == ".py":
        return "mark.gpu" not in collection_path.read_text(encoding="utf-8") or None


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
