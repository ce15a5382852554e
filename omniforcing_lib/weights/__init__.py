"""Checkpoints: headers before belief, four formats in and two out, fp8 and offloading."""
