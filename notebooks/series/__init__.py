"""What a reader sees: figures, the live player, the run context of a notebook, the series and its report."""
