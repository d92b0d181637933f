"""Fine-tuning on the stages of a pipeline: loss, gradients, optimizer, data order, checkpoints. Knows nothing of Ray."""
