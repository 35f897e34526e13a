"""Fine-tuning: a model directory and MindRecord data in, a trained model directory out."""
