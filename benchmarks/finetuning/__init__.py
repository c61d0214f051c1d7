"""Fine-tuning on a packed base, measured: what `benchmarks/finetune.py` runs."""
