"""Training of CC4S: certainty and consistency in scribble-supervised semantic segmentation."""
