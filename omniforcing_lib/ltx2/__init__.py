"""LTX-2's own VAEs, vocoder, connectors and Gemma; streaming decode by overlap and crop."""
