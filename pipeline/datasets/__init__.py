"""Convert images with captions, and datasets with ground truth as their owners ship them, to shards.

Each reader lists images in a fixed order; one writer makes the tars:
``write_samples(open_image_folder(root).samples, dest)``, ``write_shards(open_voc(root, "val"), dest)``.
Nothing is imported here, so that the command line starts fast.
"""
