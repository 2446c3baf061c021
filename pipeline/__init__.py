"""The application: shards of captioned images in, pseudo-masks as Parquet out."""

import sys as _sys

from pipeline.installation import is_command as _is_command
from pipeline.installation import problem_with_legrad as _problem_with_legrad

# before any module imports `legrad`, whose names may be those of another package
if _problem := _problem_with_legrad():
    if not _is_command():
        raise ImportError(_problem)
    from pipeline.text import on_screen as _on_screen

    _sys.stderr.write(_on_screen(f"legrad: {_problem}\n"))
    _sys.exit(2)
