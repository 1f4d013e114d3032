"""A finished run behind the OpenAI API."""
