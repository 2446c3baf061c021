"""Convert datasets with ground truth, laid out as their owners ship them, to shards.

Each reader lists the images of a dataset in a fixed order and reads one at a time; one writer makes the tars:
``write_shards(open_voc(root, "val"), dest)``. Nothing is imported here, so that the command line starts fast.
"""
