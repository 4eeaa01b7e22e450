"""The measured claims: `python -m bench hooks kernel step collect gpu`; README.md here says how to read them."""
