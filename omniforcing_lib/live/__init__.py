"""The stream: frames and samples a block at a time, and its steady passes as CUDA graphs."""
