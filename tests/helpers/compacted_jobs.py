"""Output folders for tests of `legrad compact`, and what is to be found in them by shard."""

import numpy as np

from pipeline.output.compaction import write_compaction
from pipeline.output.compaction_plan import plan_compaction
from pipeline.output.folder import OutputFolder
from pipeline.output.schema import ANNOTATION_SCHEMA, ERROR_SCHEMA
from pipeline.output.status import read_status
from pipeline.run.job import record_success
from tests.helpers.corpus import image_bytes
from tests.helpers.report_jobs import error, row, varied_rows, write_job

SCHEMAS = {"annotations": ANNOTATION_SCHEMA, "errors": ERROR_SCHEMA}


def many_rows(samples, prompts):
    """Rows that fill several groups, of few samples."""
    return [
        row(index, prompt, class_id=1 + prompt % 5, similarity=round(0.1 + 0.001 * prompt, 4), heat=False)
        for index in range(samples)
        for prompt in range(prompts)
    ]


def complete_job(folder):
    """OUT of four shards: 30 rows and an error, no rows, 2,300 rows, 12 rows; with _SUCCESS."""
    shards = [varied_rows(30, classes=3), [], many_rows(10, 230), varied_rows(12, classes=2)]
    out = write_job(folder, shards, errors=[error(40)], images=image_bytes(1), run={"error_budget": 0.5})
    record_success(OutputFolder(str(out)), len(shards), 0, read_status(str(out)).counts)
    return out


def compacted(out, new, *, target_mib=512):
    """Compact a folder with the pipeline's own functions; returns NEW."""
    write_compaction(plan_compaction(str(out), target_mib), str(new))
    return new


def rows_by_shard(out, shard_ids=None):
    """All rows of both tables by shard id, read as our readers do; None: of all shards."""
    folder = OutputFolder(str(out))
    found = {}
    for table, schema in SCHEMAS.items():
        for shard_id in sorted(folder.ids(table) if shard_ids is None else shard_ids):
            with folder.open(table, shard_id) as file:
                found[table, shard_id] = list(file.rows(schema.names))
                assert len(found[table, shard_id]) == file.row_count == sum(file.group_row_counts)
    return found


def assert_same_arrays(first, second):
    """Two dataclasses of arrays, numbers and mappings hold the same."""
    for name, value in vars(first).items():
        other = vars(second)[name]
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, other, err_msg=name)
        else:
            assert value == other, name
