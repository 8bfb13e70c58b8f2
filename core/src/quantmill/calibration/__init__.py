"""Calibration: blocks stream from the checkpoint, meet their real inputs, and leave quantized."""
