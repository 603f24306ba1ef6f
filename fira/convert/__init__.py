"""The same model in another form: Hugging Face folders, GGUF files, int8 and int4 weights."""
