"""Published towers and VAEs, read from folders in the layouts of Hugging Face and diffusers."""
