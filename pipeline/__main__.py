"""``python -m pipeline`` and the console script ``legrad``: the command line in a process of its own."""

import sys

from pipeline.errors import UserError
from pipeline.process.ending import skip_native_exit
from pipeline.process.surroundings import settle_in


def run() -> None:
    """Run the command line and end with its exit code."""
    end_with = skip_native_exit()
    try:
        settle_in()
    except UserError as error:
        from pipeline.text import on_screen

        sys.stderr.write(on_screen(f"legrad: {error}\n"))
        end_with(1)
        return
    # only now: what it imports looks at the environment
    from pipeline.cli.main import main

    try:
        main()
    except SystemExit as ending:
        if isinstance(ending.code, int | None):
            end_with(ending.code or 0)
        raise
    end_with(0)


if __name__ == "__main__":
    run()
