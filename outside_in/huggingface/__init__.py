"""GPT-2's weights in Hugging Face's form."""
