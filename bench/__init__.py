"""The project's figures, each a ratio to a baseline that is measured in the same run: `python -m bench`."""
