"""Fine-tuning on one's own images: the plan, the run, and what comes out of it."""
