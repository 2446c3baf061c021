"""Entry point of ``python -m pipeline`` and of the console script ``legrad``."""

import sys


def run() -> None:
    """Run the command line and end with its exit code."""
    if sys.argv[1:2] == ["--version"]:
        # answered before anything else is imported
        from importlib.metadata import version

        sys.stdout.write(f"legrad {version('legrad-pipeline')}\n")
        return
    from pipeline.errors import UserError
    from pipeline.process import prepare_environment, skip_native_exit

    end_with = skip_native_exit()
    try:
        prepare_environment()
    except UserError as error:
        from pipeline.text import on_screen

        sys.stderr.write(on_screen(f"legrad: {error}\n"))
        end_with(1)
        return
    # imported only now, because its imports read the environment
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
