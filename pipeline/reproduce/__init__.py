"""The paper's tables from a folder of the owners' data; see README.md.

owners_data (what is in the folder) -> measuring (segmentation, points, perturbation: one record an image) ->
journal (records on disk, resumable) -> tables (records summed, the paper's figures beside) -> run
"""
