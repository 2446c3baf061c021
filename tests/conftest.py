"""Shared by all tests: shapes in `legrad` are checked, and random numbers do not depend on the order."""

from pipeline.process import skip_native_exit

# Before anything imports ray or torch: native threads once made a run that had passed end with code 139.
end_with = skip_native_exit()

from jaxtyping import install_import_hook  # noqa: E402

# Before anything imports legrad; a module imported earlier would go unchecked.
install_import_hook("legrad", "beartype.beartype")

import signal  # noqa: E402
from collections.abc import Iterator  # noqa: E402

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# How long an example takes says more of the machine than of the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# Files and tests that get the mark `medium`, by the beginning of their names: they start servers, browsers or
# processes, or one test takes more than half a second of CPU time.
MEDIUM = (
    "tests/fuzz/",
    "tests/legrad/test_doc_examples.py",
    "tests/legrad/test_eva.py::test_all_of_open_clips_models",
    "tests/legrad/test_golden.py",
    "tests/legrad/test_kernels.py::test_the_kernel_equals_the_whole_product_in_tritons_interpreter",
    "tests/legrad/test_examples.py",
    "tests/legrad/test_explainer.py::test_what_does_not_fit",
    "tests/legrad/test_package.py",
    "tests/legrad/test_quality_refusals.py",
    "tests/pipeline/test_annotate.py",
    "tests/pipeline/test_attempts.py",
    "tests/pipeline/test_annotate_views.py",
    "tests/pipeline/test_completion.py",
    "tests/pipeline/test_contact_sheet.py",
    "tests/pipeline/test_converted_images.py",
    "tests/pipeline/test_demo_assets.py",
    "tests/pipeline/test_device_step.py",
    "tests/pipeline/test_dispatcher_",
    "tests/pipeline/test_engine.py",
    "tests/pipeline/test_evaluate.py",
    "tests/pipeline/test_explain_command.py::test_all_arguments",
    "tests/pipeline/test_google_storage.py",
    "tests/pipeline/test_hostile_outputs.py",
    "tests/pipeline/test_init.py::test_any_caption",
    "tests/pipeline/test_light_start.py",
    "tests/pipeline/test_listing.py::test_a_name_of_any_length",
    "tests/pipeline/test_object_stores.py",
    "tests/pipeline/test_queries.py",
    "tests/pipeline/test_refined_maps.py",
    "tests/pipeline/test_remask.py",
    "tests/pipeline/test_report",
    "tests/pipeline/test_reproduce.py",
    "tests/pipeline/test_row_keys.py",
    "tests/pipeline/test_same_rows.py",
    "tests/pipeline/test_secrets.py",
    "tests/pipeline/test_segmenter.py",
    "tests/pipeline/test_slow_servers.py",
    "tests/pipeline/test_store_faults.py",
    "tests/pipeline/test_training.py",
    "tests/pipeline/test_untrusted_data.py",
    "tests/test_imports.py::test_a_breach",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Add the mark `medium` before tests are chosen by their marks."""
    for item in items:
        if item.nodeid.startswith(MEDIUM):
            item.add_marker(pytest.mark.medium)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """End the process with the exit code of the tests; a worker of xdist has to report first."""
    yield
    if not hasattr(session.config, "workerinput"):
        end_with(int(session.exitstatus))


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_arrives() -> Iterator[None]:
    """Take SIGINT, also in child processes: shells start background jobs with SIGINT ignored."""
    earlier_handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, earlier_handler)


@pytest.fixture(autouse=True)
def _same_random_numbers_in_any_order() -> Iterator[None]:
    """Give every test the same random state, and leave the state outside as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
