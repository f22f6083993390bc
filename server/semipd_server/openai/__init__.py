"""OpenAI's HTTP routes over the engine client. Needs the extra `openai`."""
