"""Scripts with cells (`# %%`) that show what the library is used for; each runs in seconds on the demo model.

Run one in an editor or notebook that knows cells, or as `python legrad/examples/NAME.py [FOLDER]`. They are
part of the repository, not of the installed package. `compare_maps` is a program, which also runs
beside the authors' package.
"""
