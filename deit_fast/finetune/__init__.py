"""What comes out of fine-tuning: evaluation, calibration, report and model card."""
