"""Serves a model over HTTP: OpenAI's API and a chat page."""
