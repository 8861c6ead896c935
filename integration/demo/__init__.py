"""The demo: a small language model reads a long text through a memstore server, and says what the memory was worth."""
