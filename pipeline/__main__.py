"""``python -m pipeline`` and the console script ``legrad``: the command line in a process of its own."""

from pipeline.ending import skip_native_exit


def run() -> None:
    """Run the command line and end with its exit code."""
    end_with = skip_native_exit()
    from pipeline.cli import main

    try:
        main()
    except SystemExit as ending:
        if isinstance(ending.code, int | None):
            end_with(ending.code or 0)
        raise
    end_with(0)


if __name__ == "__main__":
    run()
