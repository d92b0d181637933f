"""Fine-tuning on the stages of a pipeline: gradients, optimizer, data order, checkpoints. Knows nothing of Ray."""
