"""Trackers: a run's figures and predictions in SwanLab, Weights & Biases, TensorBoard, trackio."""
