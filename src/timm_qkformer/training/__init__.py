"""Training, built of timm's parts."""
