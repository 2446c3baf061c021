"""From a tar to samples: members, fields, captions, images and ground truth, all of them untrusted."""
