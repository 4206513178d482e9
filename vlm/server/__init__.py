"""The training and sampling API over HTTP: Tinker's protocol, an OpenAI-compatible one, and a page."""
