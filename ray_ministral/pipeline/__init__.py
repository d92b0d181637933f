"""Stages of a pipeline, and how the model is cut into them. Knows nothing of Ray, of captions or of training."""
