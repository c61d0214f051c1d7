"""Fine-tuning on the packed base: adapters and the residual train with PEFT, and go back into a .salr file."""
