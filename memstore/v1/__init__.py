"""Generated from proto/memstore/v1 by tools/generate_stubs.py; never edited."""
