"""What is converted: checkpoints of every kind, opened as one, and what their tensors are for."""
