"""The router's HTTP door: OpenAI's API, and the sub-request calls as REST."""
