"""All that touches vLLM: an engine in this process, one behind HTTP, and the plugin that both load weights through."""
