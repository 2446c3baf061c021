"""An output folder that would not outlive a submitted job is refused; others are not."""

import json

import pytest

from pipeline.errors import UserError
from pipeline.run.destination import (
    JOB_VARIABLE,
    check_destination,
    drain_s_after_sigterm,
    shared_folder_notes,
)


def submitted(**runtime_env):
    document = {"runtime_env": runtime_env, "metadata": {"job_submission_id": "run-1"}}
    return {JOB_VARIABLE: json.dumps(document)}


UPLOADED = submitted(working_dir="gcs://_ray_pkg_0123456789abcdef.zip", env_vars={})


@pytest.fixture
def here(tmp_path, monkeypatch):
    folder = tmp_path / "_ray_pkg_0123456789abcdef"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("output_dir", ["out", "./out", "../out", "out/run-1"])
def test_a_relative_folder_is_refused_with_the_place_where_it_would_be(here, output_dir):
    place = str(here / output_dir)
    for environ in (UPLOADED, submitted()):
        with pytest.raises(UserError) as refused:
            check_destination(output_dir, environ)
        assert str(refused.value).startswith(f"output.dir: {output_dir} is {place} in this submitted job, ")
        assert "give an absolute path" in str(refused.value)


def test_an_absolute_folder_in_the_uploaded_working_directory_is_refused(here):
    with pytest.raises(UserError, match="in the job's working directory, which Ray deletes"):
        check_destination(str(here / "out"), UPLOADED)
    # without an upload, it is a folder of that machine
    check_destination(str(here / "out"), submitted())


@pytest.mark.parametrize(
    "output_dir", ["/data/out", "~/out", "file:///data/out", "s3://bucket/out", "gs://b/o"]
)
def test_other_folders_are_accepted(here, output_dir):
    check_destination(output_dir, UPLOADED)
    check_destination(output_dir, submitted())


@pytest.mark.parametrize(
    "environ", [{}, *({JOB_VARIABLE: text} for text in ("", "{", "[]", "3", "{}", '{"runtime_env": 3}'))]
)
def test_outside_a_submitted_job_a_relative_folder_is_accepted(here, environ):
    check_destination("out", environ)


def test_a_local_folder_on_several_machines_is_one_that_all_must_see():
    (note,) = shared_folder_notes("/data/out", None, 3)
    assert note.startswith("/data/out must be the same folder on each of the 3 machines")
    assert shared_folder_notes("/data/out", "/data/maps", 1) == []
    assert shared_folder_notes("s3://bucket/out", "s3://bucket/maps", 3) == []


def test_so_is_a_local_folder_with_the_maps_of_a_remask():
    (note,) = shared_folder_notes("s3://bucket/new", "/data/maps", 2)
    assert note == (
        "/data/maps must be the same folder on each of the 2 machines, such as a network file system: every "
        "worker reads there"
    )


@pytest.mark.parametrize(
    ("environ", "drain_s", "expected_s"),
    [
        ({}, 30.0, 30.0),
        (UPLOADED, 30.0, 1.0),
        (UPLOADED, 0.5, 0.5),
        ({**UPLOADED, "RAY_JOB_STOP_WAIT_TIME_S": "62"}, 30.0, 30.0),
        ({**UPLOADED, "RAY_JOB_STOP_WAIT_TIME_S": "12"}, 30.0, 10.0),
        ({**UPLOADED, "RAY_JOB_STOP_WAIT_TIME_S": "1"}, 30.0, 0.0),
        ({**UPLOADED, "RAY_JOB_STOP_WAIT_TIME_S": "soon"}, 30.0, 1.0),
    ],
)
def test_a_submitted_job_ends_before_ray_job_stop_would_kill_it(environ, drain_s, expected_s):
    assert drain_s_after_sigterm(drain_s, environ) == expected_s
