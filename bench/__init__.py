"""The measured claims: `python -m bench hooks kernel step collect dataset`; README.md here says how to read them."""
