"""The engine of a capture, twice: natively and in plain Python. It knows neither modules nor files."""
