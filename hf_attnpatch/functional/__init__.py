"""Pure tensor mathematics: imports torch and nothing else of this project."""
