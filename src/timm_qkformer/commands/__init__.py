"""Commands of `timm-qkformer` that look into models: their arguments, and what they print. `cli` lists all commands."""
