"""Control tokens by their names. Nothing here needs MLX, which command lines import late."""

OPEN, CLOSE = "<|channel>", "<channel|>"  # around a thought
