"""The miniature world whose truth is known: rendering, codec, prompts, and detectors that judge."""
