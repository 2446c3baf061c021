"""Read tar shards: members, samples, fields, captions, images and ground truth, all of them untrusted."""
