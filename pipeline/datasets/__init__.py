"""Datasets with ground truth, laid out as their owners ship them, turned into our shards.

Each reader lists a dataset's images in a fixed order and reads one at a time; one writer makes the tars:
``write_shards(open_voc(root, "val"), dest)``. Nothing is imported here, so that the command line starts fast.
"""
