"""From grouped heads to latent attention: measure, choose what stays rotated, compress, refit, refine, move home."""
