"""From a dense or LoRA-fine-tuned checkpoint to a .salr file: sources, adapters, plan, prune, residual, pipeline."""
